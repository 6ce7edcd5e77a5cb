"""What a FAST tokenizer makes of a dataset's action chunks: how many tokens, and how far they are off when decoded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.sources.same_robot import check_same_robot
from pi05_lightning.data.split import Split


@dataclass(frozen=True)
class Chunks:
    """actions: normalised f32[N T A].  is_pad: bool[N T].  span: f64[A], real units per two normalised ones."""

    actions: np.ndarray
    is_pad: np.ndarray
    span: np.ndarray


@dataclass(frozen=True)
class Quality:
    """What a FAST tokenizer does to a dataset's chunks. RMSE is in normalised units, where most actions are -1..1."""

    dataset: str
    chunks: int
    naive_tokens: int
    """One token per action value."""
    mean_tokens: float
    p99_tokens: float
    rmse: list[float]
    """Per dimension, over steps inside the episode."""
    rmse_real: list[float]
    """The same in the dataset's own units."""
    coverage: float
    """Share of the DCT coefficients that the vocabulary spells; the others are clipped."""


def read_chunks(
    config: LeRobotConfig, of_robot: LeRobotConfig | None, horizon: int, max_chunks: int
) -> dict[Split, Chunks]:
    """At most `max_chunks` chunks of each split, evenly spaced, normalised as in training.

    Statistics are those of the training split: of `of_robot`'s, which `same_robot_as` names, or else of the dataset's
    own. ValueError for a dataset without actions, and for what `LeRobotSource` rejects, values beyond all statistics
    among it.
    """
    of_name = partial(LeRobotSource, horizon=horizon, image_size=(0, 0))
    part = partial(of_name, config, Path(config.path).name)
    train, val = part(split="train"), part(split="val")
    if of_robot is None:
        robot = train.checked_robot()
    else:
        other = of_name(of_robot, Path(of_robot.path).name, split="train")
        robot = other.checked_robot()
        if robot is not None:
            check_same_robot(train, other, robot)
        train.leave_out_unexplained(robot)
    val.leave_out_unexplained(robot)
    if robot is None or not robot.acts:
        raise ValueError(f"{config.path}: a FAST tokenizer is fitted on actions, and action_keys is empty")

    def chunks(source: LeRobotSource) -> Chunks:
        frames = [robot.to_model(source.motion(int(i))) for i in evenly_spaced(len(source), max_chunks)]
        actions = [frame.actions for frame in frames if frame.actions is not None]
        is_pad = np.array([frame.action_is_pad for frame in frames])
        return Chunks(np.array(actions, dtype=np.float32), is_pad, robot.normalize.action.span)

    return {"train": chunks(train), "val": chunks(val)}


def measure(fast: FastTokenizer, dataset: str, chunks: Chunks) -> Quality:
    """Encode the chunks of a dataset and decode them; steps past an episode's end count for the tokens alone."""
    tokens = np.array([len(row) for row in fast.encode(chunks.actions, warns=False)])
    squared = (fast.reconstruct(chunks.actions) - chunks.actions)[~chunks.is_pad] ** 2
    rmse = np.sqrt(squared.mean(0))
    return Quality(
        dataset=dataset,
        chunks=len(tokens),
        naive_tokens=int(np.prod(chunks.actions.shape[1:])),
        mean_tokens=float(tokens.mean()),
        p99_tokens=float(np.quantile(tokens, 0.99)),
        rmse=rmse.tolist(),
        rmse_real=(rmse * chunks.span / 2).tolist(),
        coverage=float(1 - fast.quantize(chunks.actions)[1].mean()),
    )
