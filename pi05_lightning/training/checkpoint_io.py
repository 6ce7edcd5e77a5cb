"""Checkpoints that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import nn

from pi05_lightning.files.local import first_line, replacing
from pi05_lightning.weights.readable import unreadable, unwritten
from pi05_lightning.weights.sharded_checkpoint import is_sharded, read, read_into, unpickle
from pi05_lightning.weights.sharded_writer import BackgroundWriter, remove, remove_leftovers, write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, where upstream goes by memory and the system's folder for temporary files.

    From there, on another file system, upstream copies: a kill leaves half a checkpoint under the final name.
    """

    evaluated: nn.Module | None = None
    """Where nothing is trained: the model into which a checkpoint is read, so that it is there once."""
    averaged = False
    """What is read so are the averages."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if not is_local(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        remove_leftovers(Path(path).parent)
        with replacing(Path(path), one_writer=True) as part:
            try:
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # the device's, though found out while writing
                raise
            except (OSError, RuntimeError) as error:  # torch's writer hides the system's error
                raise ValueError(unwritten(Path(path), first_line(error))) from error
            try:
                torch.load(part, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                raise ValueError(unreadable(checkpoint, str(path), error)) from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Of a sharded run too."""
        if self.evaluated is not None and is_local(path):
            return read_into(self.evaluated, Path(path), averaged=self.averaged)
        if is_sharded(Path(path)):
            return read(Path(path))
        if is_local(path):
            return unpickle(Path(path), mapped=False)
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        if is_local(path) and os.path.lexists(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


class ShardedCheckpointIO(AtomicCheckpointIO):
    """Every rank writes and reads its shards, so that every rank has to call; `then` and `wait` too.

    model: whose tensors say which shard a rank reads.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.in_background = False
        """Training goes on while a checkpoint is written."""
        self._writer = BackgroundWriter()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if self.in_background:
            self._writer.write(checkpoint, Path(path))
        else:
            write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.evaluated is not None:
            return read_into(self.evaluated, Path(path), averaged=self.averaged)
        return read(Path(path), self.model)

    def then(self, action: Callable[[], None]) -> None:
        """Do something once what was saved last has its name."""
        self._writer.then(action)

    def wait(self) -> None:
        """Until what was saved last has its name. Raises ValueError where it could not be written."""
        self._writer.wait()


def is_local(path: Any) -> bool:
    """Whether it is no address of a remote file system."""
    return bool(get_protocol(str(path)) == "file")
