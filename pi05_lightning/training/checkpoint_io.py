"""Checkpoint files that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol as is_local

from pi05_lightning.files.local import replacing
from pi05_lightning.module import AVERAGE


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
                free = shutil.disk_usage(part.parent).free / 2**30
                raise ValueError(
                    f"{path} could not be written ({str(error).splitlines()[0]}; {free:.1f} GiB are free): make room,"
                    " or allow larger files, and go on from the checkpoint before it"
                ) from error
            try:
                torch.load(part, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                raise ValueError(unreadable(checkpoint, str(path), error)) from error


REMEDY = "Return ints, floats, text, lists, dictionaries and tensors from state_dict and on_save_checkpoint"


def unreadable(checkpoint: dict[str, Any], path: str, error: Exception) -> str:
    """Why a checkpoint could not be read again, in words."""
    wrong = ", ".join(unreadable_places(checkpoint))
    return (
        f"{path} is not written: {wrong} holds more than tensors and plain types, and could never be read again"
        f" ({str(error).splitlines()[0]}). {REMEDY}"
    )


def unreadable_places(checkpoint: dict[str, Any]) -> list[str]:
    """Which of a checkpoint's entries are no tensors and plain types."""
    places = {f"{key}": value for key, value in checkpoint.items() if key != "callbacks"}
    places |= {f"callbacks/{key}": value for key, value in checkpoint.get("callbacks", {}).items()}
    return [place for place, value in places.items() if not readable(value)]


def check_readable(checkpoint: dict[str, Any]) -> None:
    """Raises ValueError, before anything is trained, for a checkpoint that could not be read again.

    Weights and their like are tensors already, and too large to try.
    """
    large = {"state_dict", "optimizer_states", AVERAGE}
    if wrong := unreadable_places({key: value for key, value in checkpoint.items() if key not in large}):
        raise ValueError(
            f"no checkpoint could be read again: {', '.join(wrong)} holds more than tensors and plain types. {REMEDY}"
        )


def readable(value: Any) -> bool:
    """Whether a value can be pickled, and what is pickled of it read without executing anything of it."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError):  # the last two of a lock, and of a lambda
        return False
    return True
