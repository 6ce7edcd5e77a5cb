"""Checkpoint files that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol as is_local

from pi05_lightning.files.local import replacing
from pi05_lightning.weights.readable import unreadable, unwritten


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, where upstream goes by memory and the system's folder for temporary files.

    From there, on another file system, upstream copies: a kill leaves half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if not is_local(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with replacing(Path(path), one_writer=True) as part:
            try:
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
            except (OSError, RuntimeError) as error:  # torch's writer hides the system's error
                raise ValueError(unwritten(Path(path), str(error))) from error
            try:
                torch.load(part, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                raise ValueError(unreadable(checkpoint, str(path), error)) from error
