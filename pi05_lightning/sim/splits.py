"""Which initial states are trained on, and which are kept for validation and for rollouts."""

from __future__ import annotations

import zlib

import numpy as np

from pi05_lightning.files.ranges import check_range

CHAINS = WORDS = 1  # a chain has no other words
BEGINNING, OTHERS, SLIPS = 2, 3, 4
"""Streams of random numbers of one initial state, by what is drawn from them; things and pushes are drawn from the
first, which has no number."""

SPLITS = ("train", "val", "rollout")
SEEDS_PER_SPLIT = 1_000_000
EXPERIENCE = "experience"
"""What a policy tries itself at: the last quarter of the training's, of which demonstrations take the first half, and
their single frames what follows."""
LIBERO_STATES = 50
"""Initial states of each of LIBERO's tasks, of which rollouts take the first and attempts the last."""


def rng_of(task: str, seed: int, *stream: int) -> np.random.Generator:
    """What is drawn of a task's initial state, in one of its streams."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), *stream])


def in_32_bits(seed: int) -> int:
    """A seed for generators that take 32 bits: the same where they take it, else one that is drawn from it."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def libero_states(split: str, count: int, seed: int) -> list[int]:
    """The first initial states of a task for seed 0, as LIBERO is evaluated; the next ones for seed 1.

    A policy's attempts to learn from begin with the last one. Raises ValueError for more than there are: the same
    episodes would be counted again.
    """
    check_range("seed", seed, 0)
    if (1 if split == EXPERIENCE else seed + 1) * count > LIBERO_STATES:
        raise ValueError(
            f"LIBERO has {LIBERO_STATES} initial states of a task, and {count} episodes with seed {seed} would begin in"
            " some of them again: give fewer, or a lower seed"
        )
    if split == EXPERIENCE:
        return [LIBERO_STATES - 1 - number for number in range(count)]
    return list(range(seed * count, (seed + 1) * count))


def split_seeds(split: str, count: int, seed: int = 0, start: int = 0) -> list[int]:
    """Seeds of `count` initial states of a split, from `start` on; no two splits and no two `seed`s share one.

    Raises ValueError on an unknown split or more seeds than a split has.
    """
    if split == EXPERIENCE:
        return split_seeds("train", count, seed, SEEDS_PER_SPLIT * 3 // 4 + start)
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join((*SPLITS, EXPERIENCE))}")
    if seed < 0 or start + count > SEEDS_PER_SPLIT:
        raise ValueError(
            f"a split has {SEEDS_PER_SPLIT} initial states and seeds start at 0: got seed {seed}, {count=}"
        )
    first = (seed * len(SPLITS) + SPLITS.index(split)) * SEEDS_PER_SPLIT + start
    return list(range(first, first + count))
