"""Which samples batch k holds: a function of seed, k, rank, world size and stage, so resuming needs only k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from pi05_lightning.recipe import Recipe

Draw = tuple[int, int, int]
"""(entry, index within the entry, key)."""


@dataclass(frozen=True)
class Entry:
    """Something to draw from: a source as one modality."""

    name: str
    """`source/modality`."""
    size: int


class Mixture:
    """Weighted draws from entries.

    Shares are exact to one sample per batch (systematic sampling). Within a step no sample is drawn twice as long as
    the entry has enough, so ranks see disjoint samples, whose union is what one rank with a larger batch would see.
    """

    def __init__(self, entries: Sequence[Entry], batch_size: int, seed: int = 0) -> None:
        if not entries:
            raise ValueError("a mixture needs at least one entry")
        for entry in entries:
            if not entry.size:
                raise ValueError(f"{entry.name} has no samples")
        self.entries, self.batch_size, self.seed = list(entries), batch_size, seed

    def weights(self, shares: Mapping[str, float]) -> np.ndarray:
        """Shares by name as probabilities f64[entries]; all equal when none are given."""
        names = [entry.name for entry in self.entries]
        unknown = set(shares) - set(names)
        if unknown:
            raise ValueError(f"mixture: unknown {sorted(unknown)}; the data has {names}")
        if any(share < 0 for share in shares.values()):
            raise ValueError(f"mixture: a share is negative in {dict(shares)}")
        weights = np.array([shares.get(name, 0.0) for name in names]) if shares else np.ones(len(names))
        if not weights.sum():
            raise ValueError(f"mixture: all shares are zero in {dict(shares)}")
        return weights / weights.sum()

    def batch(self, k: int, weights: np.ndarray, rank: int = 0, world: int = 1) -> list[Draw]:
        """The draws of batch k on a rank."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**63, k]))
        total = self.batch_size * world
        points = (np.arange(total) + rng.random()) / total
        chosen = np.searchsorted(np.cumsum(weights), points, side="right").clip(max=len(weights) - 1)
        index = np.empty(total, dtype=np.int64)
        for entry in np.unique(chosen):
            here = np.flatnonzero(chosen == entry)
            size = self.entries[entry].size
            index[here] = rng.choice(size, len(here), replace=len(here) > size, shuffle=True)
        order = rng.permutation(total)
        mine = order[rank::world]
        return [(int(chosen[i]), int(index[i]), k * total + int(i)) for i in mine]


class MixtureSampler(Sampler[list[Draw]]):
    """The batches of a run from `start` on; a batch's stage is decided by its index, since workers prefetch."""

    def __init__(
        self,
        mixture: Mixture,
        recipe: Recipe | None,
        *,
        num_batches: int,
        start: int = 0,
        batches_per_step: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.mixture, self.recipe = mixture, recipe
        self.num_batches, self.start, self.batches_per_step = num_batches, start, batches_per_step
        self.rank, self.world = rank, world
        # made here, so that a wrong name fails before the first step and not at the stage switch
        self.weights = {
            stage: mixture.weights(shares)
            for stage, shares in (
                ("pretrain", recipe.pretrain.mixture if recipe else {}),
                ("posttrain", recipe.posttrain.mixture if recipe else {}),
            )
        }

    def __len__(self) -> int:
        return self.num_batches  # of the whole run, also when it starts later: Lightning counts from 0

    def __iter__(self) -> Iterator[list[Draw]]:
        for k in range(self.start, self.num_batches):
            stage = self.recipe.stage_at(k // self.batches_per_step) if self.recipe else "posttrain"
            yield self.mixture.batch(k, self.weights[stage], self.rank, self.world)
