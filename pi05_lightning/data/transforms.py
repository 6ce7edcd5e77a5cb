"""What happens to a frame before the model, each with its inverse, which happens to an action after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pi05_lightning.types import Frame

LEAST_RANGE = 0.02  # of a wide dim's: smaller ranges are a held joint's noise, or nothing
ROUNDING = 2**14  # spacings of float32: an action is off by one or two of them wherever it is computed
WIDE = 0.75  # the quantile of the dims' ranges that is wide: the widest may be of other units, such as an encoder's


@dataclass(frozen=True)
class RelativeActions:
    """Chosen dims of the actions as offsets from the state that the chunk starts at."""

    dims: tuple[int, ...]
    state_dims: tuple[int, ...]
    """Of the state, in the order of `dims`."""

    def __call__(self, frame: Frame) -> Frame:
        return frame if frame.actions is None else replace(frame, actions=self.offsets(frame.actions, frame))

    def offsets(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        """Actions f32[... T A] that answer a frame, as they are trained on."""
        return self._shifted(actions, frame, -1)

    def undo(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        """Actions f32[... T A] that answer a frame, absolute again."""
        return self._shifted(actions, frame, +1)

    def _shifted(self, actions: np.ndarray, frame: Frame, sign: int) -> np.ndarray:
        """The actions, `sign` times the state added to the chosen dims; ValueError for a frame without a state."""
        if frame.state is None:
            raise ValueError("relative actions need a state, and there is none")
        moved = np.array(actions, dtype=np.float32)
        moved[..., list(self.dims)] += sign * np.asarray(frame.state, np.float32)[list(self.state_dims)]
        return moved


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

    @property
    def unit(self) -> np.ndarray:
        """What a robot's values are told apart by, f64[A]: the range q99 - q01 of each dim.

        Of a dim that hardly varied, whose range says little, a share of a wide dim's range.
        """
        span = self.q99.astype(np.float64) - self.q01
        least = LEAST_RANGE * np.quantile(span[span > 0], WIDE, method="higher") if span.any() else 1.0
        return np.maximum(span, least)

    @property
    def computed_unit(self) -> np.ndarray:
        """What two computations of one value are compared by, f64[A]: each dim's own range, or ROUNDING if more."""
        return np.maximum(self.span, ROUNDING * np.spacing(np.maximum(abs(self.q01), abs(self.q99)))).astype(np.float64)

    def distance(self, x: np.ndarray) -> np.ndarray:
        """How far f[... A] lies beyond the nearer quantile, in `unit`s of its dim; 0 between the quantiles."""
        x = np.asarray(x, np.float64)
        return np.maximum(self.q01 - x, x - self.q99).clip(min=0) / self.unit

    def widened(self, least: float) -> Quantiles:
        """The same with every range at least so wide, about its middle."""
        missing = (least - (self.q99 - self.q01)).clip(min=0) / 2
        return Quantiles(self.q01 - missing, self.q99 + missing)


@dataclass(frozen=True)
class Normalize:
    """State and actions in quantile-normalised units."""

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
