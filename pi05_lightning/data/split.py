"""The parts of a dataset, what they are called, and which of its episodes or rows are held out for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]

NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What datasets call their parts, as `datasets` reads the names of files (SPLIT_KEYWORDS in its data_files.py)."""

# Fractional parts of the golden ratio and of the root of two: multiples of either fill [0, 1) evenly.
_GOLDEN = 0.6180339887498949
_SILVER = 0.41421356237309515


def named_parts(names: Iterable[str], where: str) -> dict[Split, str]:
    """The name that a dataset gives each part, of those that it has; ValueError when two names are the same part's."""
    found: dict[Split, str] = {}
    for name in names:
        split = next((split for split, known in NAMES.items() if name.lower() in known), None)
        if split in found:
            raise ValueError(f"{where}: {found[split]} and {name} are both the {split} part: say which is")
        if split is not None:
            found[split] = name
    return found


def held_out(groups: Sequence[Hashable], contents: Sequence[Collection[Hashable]], fraction: float) -> np.ndarray:
    """Whether each episode (or row) belongs to validation, bool[N].

    groups: what each is like.  contents: what it would teach, and what training is not to lose.

    One that holds what no earlier one does is trained on.  Of the others n · fraction are held out of any stretch of n
    alike, give or take one or two, whichever way groups alternate.  All of it depends on earlier ones alone, so none
    changes sides when others are appended.  Where all are alike the second is held out: a dataset of a few episodes has
    something to validate on, and something to train on.  Raises ValueError for a fraction that is none.
    """
    check_fraction(fraction)
    held = np.zeros(len(groups), dtype=bool)
    known: set[Hashable] = set()
    numbers: dict[Hashable, int] = {}
    counts = Counter[Hashable]()
    for place, (group, teaches) in enumerate(zip(groups, contents, strict=True)):
        if place and known.issuperset(teaches):
            start = numbers.setdefault(group, len(numbers)) * _SILVER
            held[place] = (start + counts[group] * _GOLDEN) % 1.0 < fraction
            counts[group] += 1
        known.update(teaches)
    return held


def check_fraction(fraction: float) -> None:
    """ValueError for a share held out that is negative, or that leaves nothing to train on."""
    if not 0 <= fraction < 1:
        raise ValueError(f"val_fraction is {fraction}: from 0 to below 1, so that something is left to train on")
