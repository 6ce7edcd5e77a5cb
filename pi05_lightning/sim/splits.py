"""Which initial states are trained on, and which are kept for validation and for rollouts."""

from __future__ import annotations

CHAINS = WORDS = 1  # a chain has no other words
BEGINNING, OTHERS, SLIPS = 2, 3, 4
"""Streams of random numbers of one initial state, by what is drawn from them; things and pushes are drawn from the
first, which has no number."""

SPLITS = ("train", "val", "rollout")
SEEDS_PER_SPLIT = 1_000_000
EXPERIENCE = "experience"
"""What a policy tries itself at: the second half of the training's, of which demonstrations take the first."""
LIBERO_STATES = 50
"""Initial states of each of LIBERO's tasks, of which rollouts take the first and attempts the last."""


def split_seeds(split: str, count: int, seed: int = 0, start: int = 0) -> list[int]:
    """Seeds of `count` initial states of a split, from `start` on; no two splits and no two `seed`s share one.

    Raises ValueError on an unknown split or more seeds than a split has.
    """
    if split == EXPERIENCE:
        return split_seeds("train", count, seed, SEEDS_PER_SPLIT // 2 + start)
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join((*SPLITS, EXPERIENCE))}")
    if seed < 0 or start + count > SEEDS_PER_SPLIT:
        raise ValueError(
            f"a split has {SEEDS_PER_SPLIT} initial states and seeds start at 0: got seed {seed}, {count=}"
        )
    first = (seed * len(SPLITS) + SPLITS.index(split)) * SEEDS_PER_SPLIT + start
    return list(range(first, first + count))
