"""What can be written to a checkpoint so that it can be read again, and what is said where it cannot."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from pi05_lightning.files.local import first_line

REMEDY = "Return ints, floats, text, lists, dictionaries and tensors from state_dict and on_save_checkpoint"


def unreadable(checkpoint: dict[str, Any], path: str, error: Exception) -> str:
    """Why a checkpoint could not be read again, in words."""
    wrong = ", ".join(unreadable_places(checkpoint))
    return (
        f"{path} is not written: {wrong} holds more than tensors and plain types, and could never be read again"
        f" ({first_line(error)}). {REMEDY}"
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
    large = {"state_dict", "optimizer_states", "ema"}
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


def gone(path: Path) -> str:
    """What is said of a checkpoint that is not there when it is read."""
    return (
        f"{path} is not there: where its run trains, it has replaced it meanwhile, and the same command takes another"
    )


def free_bytes(path: Path) -> int:
    """Of the disk that a path is, or will be, on."""
    there = path.absolute()
    return shutil.disk_usage(next(folder for folder in (there, *there.parents) if folder.is_dir())).free


def unwritten(path: Path, error: str) -> str:
    """Why a checkpoint could not be written, and how much room there is.  error: a line."""
    return (
        f"{path} could not be written ({error}; {free_bytes(path) / 2**30:.1f} GiB are free): make room, or allow"
        " larger files, and go on from the checkpoint before it"
    )
