"""Checkpoints of sharded runs are written: as a whole or not at all, at once or in the background."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from pi05_lightning.files.local import delete, first_line
from pi05_lightning.ranks import is_first_rank, together
from pi05_lightning.weights.readable import check_readable, unwritten
from pi05_lightning.weights.sharded_checkpoint import (
    KINDS,
    META,
    check_whole,
    kinds_of_ranks,
    split,
)
from pi05_lightning.weights.shards import first_failure


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint, every rank its shards, to a file system that all of them share; collective.

    checkpoint: Lightning's, as a single process has it. Its weights, their average (`ema`) and the optimizer's state
    (by number, with `param_names` in its groups) may be DTensors, of which each rank has its shard.

    It lies beside `path` until it is whole and has been checked, and is then renamed by rank 0: no kill leaves a part
    under the final name. What a killed run left there is removed.  ValueError on all ranks where one of them fails.
    """
    path = Path(path)
    tensors, rest = split(checkpoint)
    part = _begin(rest, path)
    with together(), _writing(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        dcp.save(tensors, storage_writer=FileSystemWriter(part))
    with together():
        if is_first_rank():
            _finish(part, path)


def _begin(rest: dict[str, Any], path: Path) -> Path:
    """Make the directory that is to become a checkpoint, with all that is not sharded; collective."""
    part = path.with_name(f".{path.name}.part")
    if kinds := kinds_of_ranks(rest):
        rest = rest | {KINDS: kinds}
    with together():
        if is_first_rank():
            check_readable(rest)
            remove_leftovers(path.parent)
            with _writing(path):
                part.mkdir(parents=True)
                with (part / META).open("wb") as file:
                    torch.save(rest, file)
                    os.fsync(file.fileno())
    return part


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """ValueError that says what to do where a disk is full, or the like."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise ValueError(unwritten(path, first_failure(error))) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(unwritten(path, first_line(error))) from error


def _finish(part: Path, path: Path) -> None:
    """Give a directory that all ranks have written its name, once it is known to be readable; rank 0's."""
    check_whole(part)
    _synchronize(part)
    aside = _aside(path)
    if os.path.lexists(path):  # no directory takes the place of another one at once
        path.rename(aside)
    part.rename(path)
    _synchronize(path.parent)
    delete(aside)


def remove(path: Path) -> None:
    """Remove a checkpoint, a directory too: a kill leaves no part of it under its name."""
    aside = _aside(path)
    path.rename(aside)
    delete(aside)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of checkpoints that they wrote, replaced or removed."""
    for left in folder.glob(".*.ckpt.part"):
        delete(left)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old.ckpt.part")


def _synchronize(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BackgroundWriter:
    """Writes checkpoints, as `write` does, while training goes on; one at a time.

    Weights, average and optimizer state are copied to the host's memory first, each rank's shard.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._tasks: list[Future[None]] = []
        """Of the checkpoint under way: that it is written, and what is to follow."""
        self._group: dist.ProcessGroup | None = None

    def write(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Begin to write a checkpoint, once the one before it is written; collective.

        ValueError on all ranks for what could not be read again, and where the one before it failed.
        """
        self.wait()
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # of its own: training uses the others meanwhile
        tensors, rest = split(checkpoint)
        part = _begin(rest, path)
        saved = dcp.async_save(tensors, storage_writer=FileSystemWriter(part), process_group=self._group)
        self._tasks = [self._thread.submit(self._complete, saved, part, path)]

    @staticmethod
    def _complete(saved: Any, part: Path, path: Path) -> None:
        with _writing(path):
            saved.result()
            if is_first_rank():  # which has the others' results
                _finish(part, path)

    def then(self, action: Callable[[], None]) -> None:
        """Do something on this rank once the checkpoint under way has its name, and not if it does not get it."""
        if not self._tasks:
            return action()
        written = self._tasks[0]

        def follow() -> None:
            written.result()
            action()

        self._tasks.append(self._thread.submit(follow))

    def wait(self) -> None:
        """Until the checkpoint under way is written; collective. ValueError on all ranks where it was not."""
        tasks, self._tasks = self._tasks, []
        if not tasks:  # as on all ranks
            return
        with together():
            for task in tasks:
                task.result()
