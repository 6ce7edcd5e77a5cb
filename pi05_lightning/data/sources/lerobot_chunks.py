"""The action chunks that begin at the rows of a LeRobot dataset, and statistics of what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi05_lightning.data.robot import OUTLIER, Robot
from pi05_lightning.data.sources.lerobot_columns import Columns
from pi05_lightning.data.statistics import FeatureStats, offsets, steps_trained_on
from pi05_lightning.data.transforms import Quantiles, RelativeActions


@dataclass(frozen=True)
class Chunks:
    """One for each row of N.

    end i64[N]: the row where a chunk ends at the latest: that where its episode does, or an earlier one.
    horizon: steps of a chunk.  steps: those of them that are actions; what is left, and what is past the end, is
    padding.  relative: dims of the action that are trained relative to the state.
    """

    columns: Columns
    end: np.ndarray
    horizon: int
    steps: int
    relative: RelativeActions | None

    def at(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The actions of the chunk that begins at a row, f32[T A], and which are padding, bool[T]."""
        steps = np.arange(row, row + self.horizon)
        end = min(self.end[row], row + self.steps)
        return self.columns.action[np.minimum(steps, end - 1)], steps >= end

    def holding(self, bad: np.ndarray) -> np.ndarray:
        """Which rows' chunks hold a row for which bool[N] holds, bool[N]."""
        until = np.concatenate([[0], np.cumsum(bad)])
        return until[np.minimum(np.arange(len(bad)) + self.steps, self.end)] > until[:-1]

    def far(self, robot: Robot) -> np.ndarray:
        """Which rows' chunks hold a value that a robot's statistics do not explain, bool[N]."""
        columns, relative, quantiles = self.columns, robot.relative, robot.normalize.action
        if relative is None:
            return self.holding(beyond(quantiles, columns.action))
        far = np.zeros(len(self.end), dtype=bool)
        for step in range(self.steps):
            action = columns.action[np.minimum(np.arange(len(far)) + step, self.end - 1)]
            action[:, list(relative.dims)] -= columns.state[:, list(relative.state_dims)]
            far |= beyond(quantiles, action)
        return far

    def statistics(self, rows: np.ndarray) -> tuple[FeatureStats, FeatureStats]:
        """Of the state and of the action, over what is trained on where the chunks of some rows are.

        The state counts at every row, and an action once if some row's chunk holds it; a dim relative to the state
        counts once for every row and action of its chunk.
        """
        state, action = self.columns.state, self.columns.action
        stop = np.minimum(rows + self.steps, self.end[rows])
        steps, relative = steps_trained_on(rows, stop, len(action)), self.relative
        states = dict(zip(relative.dims, relative.state_dims, strict=True)) if relative else {}
        return FeatureStats.of(state[rows, dim] for dim in range(state.shape[1])), FeatureStats.of(
            offsets(action[:, dim], state[:, states[dim]], rows, stop) if dim in states else action[steps, dim]
            for dim in range(action.shape[1])
        )


def beyond(quantiles: Quantiles, values: np.ndarray) -> np.ndarray:
    """Which rows f32[N D] hold a value that no statistics explain, bool[N]."""
    return (np.abs(quantiles.normalize(values)) > OUTLIER).any(axis=1)
