"""Success rates and their intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import binomtest

ALL = "all tasks"

Success = Mapping[str, Mapping[str, Sequence[int]]]
"""mode (see `sim.modes.MODES`) -> task -> successes, trials"""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate: sound at few trials and at rates of 0 and 1, unlike ± 2 sigma.

    Raises ValueError without trials.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


class Rate(NamedTuple):
    """A success rate: its counts and its 95 % Wilson interval."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.successes / self.trials


def rates(success: Success) -> dict[str, dict[str, Rate]]:
    """mode -> task -> rate; after the tasks, `ALL` of them together."""
    table = {}
    for mode, by_task in success.items():
        counts = {**by_task, ALL: [sum(column) for column in zip(*by_task.values(), strict=True)]}
        table[mode] = {task: Rate(k, n, *wilson_interval(k, n)) for task, (k, n) in counts.items()}
    return table
