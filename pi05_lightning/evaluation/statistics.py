"""Success rates and their intervals."""

from scipy.stats import binomtest

Success = dict[str, dict[str, tuple[int, int]]]
"""mode (policy, flat, mean_replay, random, expert) -> task -> successes, trials"""


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate: sound at few trials and at rates of 0 and 1, unlike ± 2 sigma.

    Raises ValueError without trials.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def overall(success: Success) -> dict[str, dict[str, float]]:
    """mode -> successes, trials, rate and Wilson interval over all tasks."""
    table = {}
    for mode, by_task in success.items():
        successes, trials = (sum(column) for column in zip(*by_task.values(), strict=True))
        low, high = wilson_interval(successes, trials)
        table[mode] = {"successes": successes, "trials": trials, "rate": successes / trials, "low": low, "high": high}
    return table
