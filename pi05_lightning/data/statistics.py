"""Exact statistics of the states and actions that are trained on.

LeRobot's own are count-weighted means of per-episode quantiles, which are not the dataset's quantiles. These are, to
rounding: linear interpolation between order statistics, as `numpy.quantile`. The names are LeRobot's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.transforms import Quantiles

QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class FeatureStats:
    """Per dimension, f64[A]; std is the population's. outside: i64[A], values beyond q01 or q99, of i64[A] count."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    outside: np.ndarray
    count: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """bool[A]: dims that never change, whose normalised value says nothing."""
        return self.min == self.max

    @property
    def zero_range(self) -> np.ndarray:
        """bool[A]: dims that do change, but between q01 and q99 do not; their rare values blow up when normalised."""
        return (self.q01 == self.q99) & ~self.constant

    @property
    def quantiles(self) -> Quantiles:
        """What normalises the feature."""
        return Quantiles(self.q01, self.q99)

    @classmethod
    def of(cls, dims: Iterable[np.ndarray]) -> FeatureStats:
        """From the values of each dimension, [N] of its own N, of which one at a time need be in memory.

        Values in float64 are overwritten where they are.
        """
        # by map, which lets go of a dim's values before the next one's are made
        columns = np.array([*map(_summary, dims)]).reshape(-1, len(fields(cls))).T
        return cls(*columns[:-2], *columns[-2:].astype(np.int64))

    def part(self, dims: slice) -> FeatureStats:
        """Of some dimensions."""
        return FeatureStats(**{name: values[dims] for name, values in vars(self).items()})


def vector_keys(files: LeRobotFiles) -> list[str]:
    """Features that are vectors of floating-point numbers: states and actions, not timestamps and indices."""
    return [
        key
        for key, feature in files.features.items()
        if feature["dtype"].startswith("float") and len(feature["shape"]) == 1 and key != "timestamp"
    ]


def steps_trained_on(frames: np.ndarray, stop: np.ndarray, rows: int) -> np.ndarray:
    """i64, ascending: the rows that are a step of the chunk of some frame.

    frames i64[N]: the row where each chunk starts.  stop i64[N]: the row before which it ends.  rows: of the table.
    """
    change = np.bincount(frames, minlength=rows + 1) - np.bincount(stop, minlength=rows + 1)
    return np.flatnonzero(np.cumsum(change[:-1]) > 0)


def offsets(action: np.ndarray, state: np.ndarray, frames: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """f64: every action of every frame's chunk less the state at the frame, of one dim each.

    action, state f32[rows].  frames, stop: as in `steps_trained_on`.
    """
    action, state = action.astype(np.float64), state.astype(np.float64)
    found, begin = np.empty(int((stop - frames).sum())), 0
    for step in range(int((stop - frames).max(initial=0))):
        now = frames[frames + step < stop]
        found[begin : begin + len(now)] = action[now + step] - state[now]
        begin += len(now)
    return found


def _summary(values: np.ndarray) -> tuple[float, ...]:
    """In the order of FeatureStats' fields."""
    values = values.astype(np.float64, copy=False)
    low, high = np.quantile(values, QUANTILES, overwrite_input=True)  # relative actions are as many as chunks hold
    outside = np.count_nonzero((values < low) | (values > high))
    mean, least, most = values.mean(), values.min(), values.max()
    values -= mean  # in place, as `values.std()` would not
    std = np.sqrt(np.square(values, out=values).mean())
    return mean, std, least, most, low, high, outside, len(values)
