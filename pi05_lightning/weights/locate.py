"""Weights by their path or Hub id: the one place that decides what is there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pi05_lightning.files.hub import is_on_hub, local_folder
from pi05_lightning.files.local import read_json
from pi05_lightning.weights.adapter_base import AdapterBase, unlinked
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.folder import ExportedFolder, is_exported
from pi05_lightning.weights.lerobot_folder import LeRobotFolder
from pi05_lightning.weights.openpi_folder import OpenpiFolder
from pi05_lightning.weights.orbax import is_orbax
from pi05_lightning.weights.safetensors import CONFIG, INDEX, WEIGHTS, weight_files
from pi05_lightning.weights.training_checkpoint import (
    TrainingCheckpoint,
    checkpoints_in,
    find_checkpoint,
    is_checkpoint,
)

RUNS = Path("runs")
"""Where runs are that were given no other place."""


def locate(
    path: str | Path,
    *,
    averaged: bool = True,
    tokenizer: str | None = None,
    vision_heads: int | None = None,
    horizon: int | None = None,
    fps: float | None = None,
    base: str | Path | None = None,
) -> Weights:
    """The weights at a path: of a `.ckpt`, a run's directory (its newest checkpoint), a folder or a Hub id.

    The folder is one that we exported, or LeRobot's, or openpi's (PyTorch, or JAX's `params` and `assets`).

    averaged: a training checkpoint's averaged weights, if it has any; of openpi's too.
    tokenizer: of LeRobot's and openpi's: where PaliGemma's text tokenizer is, if not where the folder says.
    vision_heads: of LeRobot's and openpi's: attention heads of SigLIP, which no file tells; by default 72 dimensions
        each if the width divides, else 16.
    horizon: of LeRobot's and openpi's: actions of a chunk, where no file tells; by default 50.
    fps: of LeRobot's and openpi's, and of what was converted from them: actions per second, where no file tells.
    base: of a checkpoint of adapters: where its base is now, if not where it was.
    ValueError when there are no weights, a folder has checkpoints beside them, ours are given what they say themselves,
    or a file of a folder's weights is named.
    """
    folder = local_folder(path)
    if folder.is_file() and (folder.suffix == Path(WEIGHTS).suffix or folder.name in (CONFIG, INDEX)):
        raise ValueError(f"{folder} is one file of a folder of weights: name its folder, {folder.parent}")
    files = weight_files(folder)
    if files and (checkpoints := checkpoints_in(folder)):
        raise ValueError(
            f"{folder} has weights of its own, and the checkpoints {', '.join(file.name for file in checkpoints)}: name"
            " a checkpoint, or move one of the two"
        )
    foreign: dict[str, Any] = {"tokenizer": tokenizer, "vision_heads": vision_heads, "horizon": horizon, "fps": fps}
    if not files:
        if is_orbax(folder):
            return OpenpiFolder(folder, averaged, **foreign)
        _check_ours(folder, foreign)
        checkpoint = find_checkpoint(folder)
        return TrainingCheckpoint(checkpoint, averaged, partial(find_base, checkpoint=checkpoint, given=base))
    if is_exported(read_json(folder / CONFIG, default={})):
        exported = ExportedFolder(folder, fps)
        if tokenizer is not None:
            exported.check_policy()
        _check_ours(folder, foreign | {"fps": None})
        _check_averaged(folder, averaged)
        return exported
    _check_averaged(folder, averaged)
    return LeRobotFolder(folder, **foreign)


def _check_ours(folder: Path, foreign: Mapping[str, object]) -> None:
    """ValueError for what is asked of LeRobot's and openpi's alone."""
    if given := [name for name, value in foreign.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: {folder} is no folder of LeRobot's or openpi's, and says that itself")


def _check_averaged(folder: Path, averaged: bool) -> None:
    """ValueError where others than the averaged weights are asked of what has one kind alone."""
    if not averaged:
        raise ValueError(f"averaged: {folder} has one kind of weights: leave it out, or name a checkpoint")


def find_base(base: AdapterBase, checkpoint: Path, given: str | Path | None = None) -> Weights:
    """The base of a checkpoint of adapters, which may be given. ValueError where it is not found, see `AdapterBase`."""
    return base.find(base.places(run_of(checkpoint), given), locate)[1]


def locate_run(path: Path) -> TrainingCheckpoint:
    """What training goes on from: a checkpoint, or the newest of a run's directory. ValueError for none."""
    return TrainingCheckpoint(find_checkpoint(path))


def pinned(path: str | Path) -> Path:
    """Where the weights at a path are by now: a run that trains has others in an hour, under the same name."""
    return unlinked(locate(path).path)


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that a checkpoint or a folder belongs to: the run's own, or its checkpoints/."""
    folder = checkpoint if checkpoint.is_dir() and not is_checkpoint(checkpoint) else checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder


def home_of(checkpoint: Path) -> Path:
    """Where what is measured of a checkpoint is written: its run; of the Hub's `user/name`, `RUNS/user--name`.

    A run that was pushed as `user/name` may be called `name` here, and keeps what was measured of it.
    """
    return RUNS / "--".join(checkpoint.parts) if is_on_hub(checkpoint) else run_of(checkpoint.expanduser())
