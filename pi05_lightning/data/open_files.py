"""Files that are kept open, and what becomes of those of which there are too many."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa


def allow_open_files() -> None:
    """Let this process, and those that it starts, have as many files open as the system lets it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, max(now, 10_240)):  # the latter on macOS, which takes no infinity
        with suppress(ValueError, OSError):
            return resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def check_open_files(error: Exception, path: Path | str) -> None:
    """OSError where a file could not be read since too many are open: it is as good as any."""
    number = getattr(error, "errno", None)  # FFmpeg's errors have one too
    if number in (errno.EMFILE, errno.ENFILE):
        told = "too many files are open: use fewer workers, or have the limit raised (`ulimit -Hn`)"
        raise OSError(number, told, str(path)) from error


@contextmanager
def reading_parquet(path: Path | str, kind: type[Exception] = ValueError, remedy: str = "") -> Iterator[None]:
    """Within it one is read: an error of this kind where it is damaged, OSError where too many files are open."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        check_open_files(error, path)
        raise kind(f"{path} is damaged ({error}){remedy and f': {remedy}'}") from error


class OpenFiles[K, T]:
    """At most `capacity` opened things by key, the least recently used closed first; a forked process starts anew.

    size: how much of the capacity one takes. The last one is kept, whatever it takes.
    """

    def __init__(
        self,
        opener: Callable[[K], T],
        capacity: int,
        close: Callable[[T], object] = lambda opened: None,
        size: Callable[[T], int] = lambda opened: 1,
    ):
        self._opener, self._capacity, self._close, self._size = opener, capacity, close, size
        self._open: OrderedDict[K, T] = OrderedDict()
        self._inherited: OrderedDict[K, T] = OrderedDict()
        self._pid = os.getpid()

    def __getitem__(self, key: K) -> T:
        if self._pid != os.getpid():  # file positions are shared across a fork; what was inherited is kept, not freed
            self._inherited, self._open, self._pid = self._open, OrderedDict(), os.getpid()
        if key in self._open:
            self._open.move_to_end(key)
        else:
            self._open[key] = self._opener(key)
            while len(self._open) > 1 and sum(map(self._size, self._open.values())) > self._capacity:
                self._close(self._open.popitem(last=False)[1])
        return self._open[key]
