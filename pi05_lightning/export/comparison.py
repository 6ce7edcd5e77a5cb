"""Does an exported policy do what the policy does? Both on the same frames, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pi05_lightning.acting.inference import Inference
from pi05_lightning.export.runner import Policy
from pi05_lightning.types import Frame

THREADS = {"openvino": "INFERENCE_NUM_THREADS", "onnx": "intra_op_num_threads"}
"""Of an engine, the option that says how many threads it has."""


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(policy: Inference, folder: Path, frames: Sequence[Frame], engine: str) -> Comparison:
    """A policy beside what was exported of it.  engine: the folder's format."""
    threads = {THREADS[engine]: torch.get_num_threads()} if engine in THREADS else {}
    exported, config = Policy(folder, **threads), policy.model.config
    noise = np.random.default_rng(0).standard_normal((len(frames), config.horizon, config.action_dim), np.float32)
    half_range = policy.processor.robots[policy.robot].normalize.action.span / 2
    with_fast = None
    if exported.fast is not None:
        with_fast = policy.acting_as(replace(policy.acting, actions="fast", guidance=1.0, inference_delay=0))
    flow, fast, same = list[float](), list[float](), list[bool]()
    seconds: list[tuple[float, float]] = []
    for frame, start in zip(frames, noise, strict=True):
        seen = {name: shown(image) for name, image in frame.images.items()}, frame.state, frame.task
        subtask = policy.predict_subtasks([frame])[0] if policy.hierarchical else None
        if policy.abilities.flow:
            ours = policy.acting_as(replace(policy.acting, actions="flow"))
            expected = ours.predict_chunks([frame], [subtask], start[None])[0]
            found = exported.act(*seen, subtask=subtask, noise=start, actions="flow")
            flow.append(float((np.abs(found - expected[: len(found)]) / half_range).max()))
        if with_fast is not None:
            expected = with_fast.predict_chunks([frame], [subtask])[0]
            found = exported.act(*seen, subtask=subtask, actions="fast")
            fast.append(float((np.abs(found - expected[: len(found)]) / half_range).max()))
        exported.reset()
        seconds.append((timed(exported.act, *seen), timed(act, policy, frame)))
        if policy.hierarchical:
            same.append(exported.subtask == subtask)
    return Comparison(
        frames=len(frames),
        flow_error=max(flow, default=None),
        fast_error=max(fast, default=None),
        same_subtasks=sum(same) if policy.hierarchical else None,
        seconds=median(theirs for theirs, _ in seconds),
        seconds_pytorch=median(ours for _, ours in seconds),
    )


def shown(image: np.ndarray) -> np.ndarray:
    """A frame's image as an observation has it."""
    return image if image.dtype == np.uint8 else image / np.float32(255)


def act(policy: Inference, frame: Frame) -> None:
    policy.predict_chunks([frame], [policy.predict_subtasks([frame])[0] if policy.hierarchical else None])


def timed(call: Callable[..., object], *args: Any) -> float:
    begun = perf_counter()
    call(*args)
    return perf_counter() - begun
