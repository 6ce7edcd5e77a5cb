"""Which part of a dataset is held out for validation."""

from __future__ import annotations

import numpy as np

# Fractional part of the golden ratio: the multiples of the number hardest to approximate by fractions fill [0, 1)
# evenly, whatever the period with which tasks alternate over the episodes.
_GOLDEN = 0.6180339887498949


def held_out(index: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each episode (or row) belongs to validation, bool like `index`.

    Depends on its number alone, so an episode never changes sides when others are added; of any stretch of n
    episodes, n · fraction are held out, give or take one or two.
    """
    return np.mod((index + 1) * _GOLDEN, 1.0) >= 1.0 - fraction
