"""Processes that simulate: as many MuJoCo renderers as processes, and none that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


@contextmanager
def simulator_processes(count: int, warm_up: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """Processes, each of which calls `warm_up`; ended at once when something goes wrong or the user interrupts.

    Raises ChildProcessError, an OSError, when one of them was killed.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start_worker)
    try:
        with _hearing_nothing():
            for _ in range(count):
                pool.submit(warm_up)
        yield pool
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
            worker.join()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                "a process that simulates was killed, most likely for want of memory: use fewer with --num_workers"
            ) from error
        raise


@contextmanager
def _hearing_nothing() -> Iterator[None]:
    """Ctrl-C waits, in processes that start meanwhile too, until they leave it to their parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
