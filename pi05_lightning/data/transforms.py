"""What happens to a frame before the model and to an action after it; what goes in has its inverse beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pi05_lightning.types import Frame


class FrameTransform(Protocol):
    """Frame -> Frame."""

    def __call__(self, frame: Frame) -> Frame: ...


class ActionTransform(Protocol):
    """actions f32[... T A] -> f32[... T A], given the frame that they answer."""

    def __call__(self, actions: np.ndarray, frame: Frame) -> np.ndarray: ...


@dataclass(frozen=True)
class Group:
    """Transforms on the way in, and what undoes them on the way out."""

    inputs: Sequence[FrameTransform] = ()
    outputs: Sequence[ActionTransform] = ()

    def push(self, inputs: FrameTransform, outputs: ActionTransform | None = None) -> Group:
        """This group with one more transform: last on the way in, first on the way out."""
        return Group((*self.inputs, inputs), ((outputs, *self.outputs) if outputs else self.outputs))

    def on_frame(self, frame: Frame) -> Frame:
        for transform in self.inputs:
            frame = transform(frame)
        return frame

    def on_actions(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        for transform in self.outputs:
            actions = transform(actions, frame)
        return actions


@dataclass(frozen=True)
class RelativeActions:
    """Chosen dims of the actions as offsets from the state that the chunk starts at; `AbsoluteActions` undoes it."""

    dims: tuple[int, ...]
    state_dims: tuple[int, ...]
    """Of the state, in the order of `dims`."""

    def __call__(self, frame: Frame) -> Frame:
        if frame.actions is None:
            return frame
        return replace(frame, actions=self.shifted(frame.actions, frame, -1))

    def shifted(self, actions: np.ndarray, frame: Frame, sign: int) -> np.ndarray:
        """The actions, `sign` times the state added to the chosen dims; ValueError for a frame without a state."""
        if frame.state is None:
            raise ValueError("relative actions need a state, and there is none")
        moved = np.array(actions, dtype=np.float32)
        moved[..., list(self.dims)] += sign * np.asarray(frame.state, np.float32)[list(self.state_dims)]
        return moved


@dataclass(frozen=True)
class AbsoluteActions:
    """The inverse of `RelativeActions`."""

    relative: RelativeActions

    def __call__(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        return self.relative.shifted(actions, frame, +1)


@dataclass(frozen=True)
class Quantiles:
    """The 1 % and 99 % quantile of every dimension, f32[A]: what maps to -1 and to 1.

    In float32 and in LeRobot 0.6.1's order of operations (processor/normalize_processor.py): a last-bit difference
    would put a state that lies on the edge of a bin into the next one, which is another token.
    """

    q01: np.ndarray
    q99: np.ndarray

    def __post_init__(self) -> None:
        for name in ("q01", "q99"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))

    def __len__(self) -> int:
        """Dimensions."""
        return len(self.q01)

    @property
    def span(self) -> np.ndarray:
        span = self.q99 - self.q01
        return np.where(span == 0, np.float32(1e-8), span)  # 1e-8: LeRobot's, for a constant dimension

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """2 (x - q01) / (q99 - q01) - 1; not clipped."""
        return 2 * (np.asarray(x, dtype=np.float32) - self.q01) / self.span - 1

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`."""
        return (np.asarray(x, dtype=np.float32) + 1) * self.span / 2 + self.q01

    def widened(self, least: float) -> Quantiles:
        """The same with every range at least so wide, about its middle."""
        missing = (least - (self.q99 - self.q01)).clip(min=0) / 2
        return Quantiles(self.q01 - missing, self.q99 + missing)


@dataclass(frozen=True)
class Normalize:
    """State and actions to quantile-normalised units."""

    state: Quantiles
    action: Quantiles

    def __call__(self, frame: Frame) -> Frame:
        return replace(
            frame,
            state=None if frame.state is None else self._checked("state", frame.state, self.state),
            actions=None if frame.actions is None else self._checked("action", frame.actions, self.action),
        )

    @staticmethod
    def _checked(name: str, x: np.ndarray, quantiles: Quantiles) -> np.ndarray:
        if x.shape[-1] != len(quantiles):
            raise ValueError(
                f"{name} has {x.shape[-1]} dimensions, but the statistics have {len(quantiles)}: they belong to"
                " another dataset or robot"
            )
        return quantiles.normalize(x)


@dataclass(frozen=True)
class Unnormalize:
    """Actions back to real units."""

    action: Quantiles

    def __call__(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        return self.action.unnormalize(actions)
