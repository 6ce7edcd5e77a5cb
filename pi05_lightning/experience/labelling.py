"""Which frames were better than expected: advantages, thresholds per task, and the signs that prompts say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lightning.data.labels import POSITIVE, RETURN, Labels
from pi05_lightning.data.returns import bootstrapped, threshold
from pi05_lightning.experience.value import AttemptDataset


@dataclass(frozen=True)
class Judged:
    """A dataset's frames: scaled returns, values and advantages f64[N]; whether they are positive, bool[N]."""

    dataset: AttemptDataset
    returns: np.ndarray
    value: np.ndarray
    advantage: np.ndarray
    positive: np.ndarray

    def labels(self, about: Mapping[str, Any]) -> Labels:
        """As they are kept."""
        numbers = {RETURN: self.returns, "value": self.value, "advantage": self.advantage}
        columns = {name: column.astype(np.float32) for name, column in numbers.items()} | {POSITIVE: self.positive}
        return Labels(self.dataset.attempts.episode, self.dataset.attempts.frame, columns, about)


def check_shares(share: float, shares: Mapping[str, float], tasks: Collection[str] | None = None) -> None:
    """ValueError for a share of positive frames that is none; shares: of tasks by name, which are among `tasks`."""
    for name, wanted in {"positive_share": share, **shares}.items():
        if not 0 < wanted < 1:
            raise ValueError(f"{name}: {wanted} is no share of the frames, give it between 0 and 1")
    if tasks is not None and (unknown := shares.keys() - tasks):
        raise ValueError(f"positive_shares: there is no task {min(unknown)!r}, only {', '.join(tasks)}")


def judge(
    datasets: Sequence[AttemptDataset],
    values: Sequence[np.ndarray],
    longest: dict[str, int],
    c_fail: float | None,
    steps: int | None,
    shares: Mapping[str, float],
    share: float,
) -> tuple[list[Judged], dict[str, float]]:
    """Every dataset's frames judged, and each task's threshold.

    values f64[N]: V of each dataset's frames.  steps: frames after which V stands for the rest; None: the whole return.
    share, shares: of the frames of a task, and of some tasks by name, that are to be positive; checked. The threshold
    is a quantile of the advantages of all but corrections, which are positive whatever theirs are.

    Raises ValueError as `threshold`.
    """
    found = []
    for one, value in zip(datasets, values, strict=True):
        returns = one.returns(longest, c_fail)
        target = returns
        if steps is not None:
            target = bootstrapped(returns, value, one.attempts.end, one.scale(longest), steps)
        found.append((one, returns, value, target - value))
    thresholds = {}
    for task in longest:
        own = [advantage[(one.attempts.task == task) & ~one.attempts.intervention] for one, _, _, advantage in found]
        if sum(map(len, own)):
            thresholds[task] = threshold(np.concatenate(own), shares.get(task, share), task)
    judged = []
    for one, returns, value, advantage in found:
        above = advantage > np.array([thresholds.get(task, np.inf) for task in one.attempts.task])
        judged.append(Judged(one, returns, value, advantage, above | one.attempts.intervention))
    return judged, thresholds


def labels_paths(roots: Sequence[Path], out: Path | None) -> list[Path]:
    """Where the labels of several datasets go. ValueError where those of two would be one file."""
    found: dict[Path, Path] = {}
    for root in roots:
        other = found.setdefault(labels_path(root, out), root)
        if other is not root:
            raise ValueError(
                f"the labels of {other} and {root} would both be {labels_path(root, out)}: rename a folder of theirs"
            )
    return list(found)


def labels_path(root: Path, out: Path | None) -> Path:
    """Where a dataset's labels go: beside it, or into a folder under its name and that of the folder it is in."""
    if out is None:
        return root.with_name(f"{root.name}.labels.parquet")
    return out / f"{root.parent.name}-{root.name}.labels.parquet"
