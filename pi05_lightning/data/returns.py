"""Returns, advantages and their signs, as π*0.6 has them (arXiv 2511.14759, §IV): pure functions of numbers.

A step's reward is -1, but at the last one: 0 for a success and -C_fail for a failure. What is left of an episode is the
sum of what comes, scaled by the longest episode of its task and kept within -1 and 0. -1 is a failure, or as long as
the longest success; 0 is success.
"""

from __future__ import annotations

import numpy as np


def monte_carlo(left: np.ndarray, success: np.ndarray, longest: np.ndarray, c_fail: float | None) -> np.ndarray:
    """The scaled return of every frame, f64[N] in [-1, 0].

    left i64[N]: frames of its episode that come after it.  success bool[N]: of its episode.  longest i64[N]: frames of
    its task's longest episode.  c_fail: steps that a failure costs; None: as many as the longest episode has.
    """
    cost = longest if c_fail is None else np.full(len(left), c_fail)
    return np.clip(-(left + np.where(success, 0, cost)) / longest, -1.0, 0.0)


def bootstrapped(
    returns: np.ndarray, value: np.ndarray, end: np.ndarray, longest: np.ndarray, steps: int
) -> np.ndarray:
    """The rewards of the next `steps` frames and the value after them, f64[N] in [-1, 0]; the return near the end.

    Frames are in order, whole episodes.  returns, value f64[N]: scaled, each by its own frame's `longest`, as an
    episode may go over to another task.  end i64[N]: the row where its episode ends.
    """
    after = np.arange(len(returns)) + steps
    inside = after < end
    rest, found = after[inside], returns.copy()
    found[inside] = np.clip((value[rest] * longest[rest] - steps) / longest[inside], -1.0, 0.0)
    return found


def threshold(advantages: np.ndarray, share: float, task: str) -> float:
    """What an advantage f64[N] has to be above so that a share of them is; 0, where fewer are above that, or N is 1.

    A share alone marks frames that went no better than expected, where most of an attempt is a failure that nothing
    changes any more: the value is right about these, and what is left is noise.

    Raises ValueError, which names the task, where they are not finite, or all the same: nothing can be told from them.
    """
    if not np.isfinite(advantages).all():
        raise ValueError(f"task {task!r}: its advantages are not all finite numbers: fit the value again")
    if len(advantages) == 1:  # that of a single frame is neither more nor less than others
        return 0.0
    if np.ptp(advantages) < 1e-9:
        raise ValueError(
            f"task {task!r}: all of its {len(advantages)} advantages are {advantages[0]:g}, so none is better than"
            " another: the value has learned nothing about it. Fit it on successes and failures of this task, or longer"
        )
    return max(0.0, float(np.quantile(advantages, 1 - share)))
