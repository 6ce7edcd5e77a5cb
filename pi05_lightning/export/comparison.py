"""Does an exported policy do what the policy does? Both on the same frames, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from pi05_lightning.acting.inference import Inference
from pi05_lightning.export.runner import Policy
from pi05_lightning.types import Frame
from pi05_lightning.weights.abilities import Actions

THREADS = {"openvino": "INFERENCE_NUM_THREADS", "onnx": "intra_op_num_threads"}
"""Of an engine, the option that says how many threads it has."""
COMPARED: dict[str, Any] = {
    "temperature": 0.0,
    "constrain_fast": True,
    "max_action_distance": None,
    "max_state_distance": None,
}
"""What both do while they are compared, however the policy acts: nothing is drawn, and nothing is refused."""
ACTIONS: tuple[Actions, ...] = get_args(Actions)


@dataclass(frozen=True)
class Comparison:
    """On how many frames, how far the actions are apart at most (normalised), and on how many it says the same."""

    frames: int
    flow_error: float | None
    """None where it has no flow head to act with; the same for the others."""
    fast_error: float | None
    same_subtasks: int | None
    seconds: float
    """Median of a chunk with all that is said before it, in the exported policy."""
    seconds_pytorch: float

    def lines(self) -> list[str]:
        """What it came to, in words."""
        error = {"flow": self.flow_error, "FAST": self.fast_error}
        said = f"subtasks: {self.same_subtasks} of {self.frames} the same"
        return [
            f"compared with PyTorch on {self.frames} frames, actions normalised to -1..1:",
            *(f"  {name}: largest error {value:.2g}" for name, value in error.items() if value is not None),
            *([f"  {said}"] if self.same_subtasks is not None else []),
            f"  a chunk, with what is said before it: {1e3 * self.seconds:.0f} ms; PyTorch"
            f" {1e3 * self.seconds_pytorch:.0f} ms",
        ]

    def problems(self, max_error: float) -> list[str]:
        """Why it is not the policy, in words."""
        error = {"flow": self.flow_error, "FAST": self.fast_error}
        beyond = [
            f"actions ({name}) are off by {value:.2g}, and max_error is {max_error:g}"
            for name, value in error.items()
            if value is not None and not value <= max_error
        ]
        other = self.frames - (self.frames if self.same_subtasks is None else self.same_subtasks)
        return [*beyond, *([f"it says another subtask on {other} of {self.frames} frames"] if other else [])]


def compare(policy: Inference, folder: Path, frames: Sequence[Frame], engine: str) -> Comparison:
    """A policy beside what was exported of it, acting as it does but for `COMPARED`.  engine: the folder's format.

    Chunks are compared where both are given the subtask, and where both say it themselves.
    """
    threads = {THREADS[engine]: torch.get_num_threads()} if engine in THREADS else {}
    exported, config = Policy(folder, **threads), policy.model.config
    exported.acting = exported.acting | COMPARED
    policy = policy.acting_as(replace(policy.acting, **COMPARED))
    acted = {name: acting_with(policy, name) for name in ACTIONS if getattr(policy.abilities, name)}
    noise = np.random.default_rng(0).standard_normal((len(frames), config.horizon, config.action_dim), np.float32)
    half_range = policy.processor.robots[policy.robot].normalize.action.computed_unit / 2
    errors: dict[str, list[float]] = {name: [] for name in acted}
    same = list[bool]()
    seconds: list[tuple[float, float]] = []
    for frame, start in tqdm(zip(frames, noise, strict=True), "comparing with PyTorch", len(frames), unit="frame"):
        seen = {name: shown(image) for name, image in frame.images.items()}, frame.state, frame.task
        subtask = policy.predict_subtasks([frame])[0] if policy.hierarchical else None
        for name, ours in acted.items():
            expected = ours.predict_chunks([frame], [subtask], start[None])[0]
            for given in (subtask, None) if policy.hierarchical else (None,):
                exported.reset()
                found = exported.act(*seen, subtask=given, noise=start, actions=name)
                errors[name].append(float((np.abs(found - expected) / half_range).max()))
        if policy.hierarchical:
            same.append(exported.subtask == subtask)
        exported.reset()
        seconds.append((timed(exported.act, *seen), timed(act, policy, frame)))
    return Comparison(
        frames=len(frames),
        flow_error=max(errors.get("flow", ()), default=None),
        fast_error=max(errors.get("fast", ()), default=None),
        same_subtasks=sum(same) if policy.hierarchical else None,
        seconds=median(theirs for theirs, _ in seconds),
        seconds_pytorch=median(ours for _, ours in seconds),
    )


def acting_with(policy: Inference, actions: Actions) -> Inference:
    """The policy with one of its heads."""
    if actions == policy.acting.actions:
        return policy
    plain: dict[str, Any] = {"guidance": 1.0, "inference_delay": 0} if actions == "fast" else {}
    return policy.acting_as(replace(policy.acting, actions=actions, **plain))


def shown(image: np.ndarray) -> np.ndarray:
    """A frame's image as an observation has it."""
    return image if image.dtype == np.uint8 else image / np.float32(255)


def act(policy: Inference, frame: Frame) -> None:
    policy.predict_chunks([frame], [policy.predict_subtasks([frame])[0] if policy.hierarchical else None])


def timed(call: Callable[..., object], *args: Any) -> float:
    begun = perf_counter()
    call(*args)
    return perf_counter() - begun
