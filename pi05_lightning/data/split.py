"""The two parts of a dataset, and which of its episodes or rows are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

import numpy as np

Split = Literal["train", "val"]

# Fractional part of the golden ratio: the multiples of the number hardest to approximate by fractions fill [0, 1)
# evenly, whatever the period with which tasks alternate over the episodes.
_GOLDEN = 0.6180339887498949


def held_out(index: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each episode (or row) belongs to validation, bool like `index`.

    Depends on its number alone, so an episode never changes sides when others are added; of any stretch of n
    episodes, n · fraction are held out, give or take one or two. Of the first two it is the second: a dataset of a few
    episodes has something to validate on, and something to train on.
    """
    return np.mod((index - 1) * _GOLDEN, 1.0) < fraction


def held_out_groups(groups: Iterable[object], fraction: float) -> np.ndarray:
    """The same for rows that belong together by a value: bool, alike for equal values, by a hash of the value."""
    values = [str(group) for group in groups]
    digests = {value: hashlib.blake2b(value.encode(), digest_size=8).digest() for value in set(values)}
    limit = (1.0 - fraction) * 2.0**64
    return np.array([int.from_bytes(digests[value]) >= limit for value in values], dtype=bool)
