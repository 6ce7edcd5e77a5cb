"""Which samples an optimizer step holds: a function of seed, step, stage and number, so resuming needs the step alone.

Ranks and accumulated batches are parts of a step: how it is split changes none of its samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.recipe import Recipe, StageOptions
from pi05_lightning.types import Modality, Subset

TrainedBy = Mapping[str, Collection[Modality]]
"""Loss term -> the modalities whose samples may have it; see `Head.terms`."""

Draw = tuple[int, int, int]
"""(entry, index within the entry, key)."""


@dataclass(frozen=True)
class Entry:
    """Something to draw from."""

    subset: Subset
    size: int
    images: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """i64[size], or [1] where all are alike: images of each sample."""
    text: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """The same for the length of its text, in any unit."""
    lacking: frozenset[str] = frozenset()
    """The loss terms that are not learned from each of its samples."""
    absent: frozenset[str] = frozenset()
    """Those that are learned from none of them."""

    def teaches(self, term: str, trained_by: TrainedBy) -> bool:
        """Whether a loss term may be learned from any of its samples."""
        return self.subset.modality in trained_by.get(term, ()) and term not in self.absent


class Mixture:
    """Weighted draws from entries, in windows of optimizer steps.

    Within a window shares are exact to one sample (systematic sampling), an entry's samples are drawn equally often,
    and a step holds samples with as many images and similar text, which differ if there are enough of that kind. Its
    accumulated batches, and the ranks of each, are disjoint parts, whose union is what one rank with one larger batch
    would see.

    trained_by: what may be learned from which modality.  batch_size: samples of one batch on one rank.
    window: steps that are drawn together.
    """

    def __init__(
        self, entries: Sequence[Entry], trained_by: TrainedBy, batch_size: int, seed: int = 0, window: int = 1
    ) -> None:
        if not entries:
            raise ValueError("there is nothing to draw from: no source has a sample of any modality")
        for entry in entries:
            if not entry.size:
                raise ValueError(f"{entry.subset} has no samples")
        self.trained_by = trained_by
        self.entries, self.batch_size, self.seed, self.window = list(entries), batch_size, seed, window
        self._last: tuple[object, np.ndarray] | None = None

    def weights(self, stage: StageOptions) -> np.ndarray:
        """Probabilities f64[entries]: a stage's share of each, × size ** temperature.

        Without shares all are equal whose every sample trains one of the stage's losses. Raises ValueError for unknown
        names, for those that nothing is learned from, and when nothing is left to draw.
        """
        names, shares = [str(entry.subset) for entry in self.entries], stage.mixture
        used = stage.weights
        terms = [{term for term in used if entry.teaches(term, self.trained_by)} for entry in self.entries]
        # a stage without losses is not refused here
        learned = [not used or bool(found) for found in terms]
        always = [not used or bool(found - entry.lacking) for found, entry in zip(terms, self.entries, strict=True)]
        for name in shares:
            if name not in names:
                raise ValueError(f"mixture: unknown {name!r}{suggestion(name, names)}; the data has {names}")
            if shares[name] and not learned[names.index(name)]:
                raise ValueError(f"mixture: nothing is learned from {name} in this stage, whose losses are {used}")
        plain = np.array([shares.get(name, 0.0) for name in names] if shares else always, dtype=np.float64)
        weights = plain * np.array([entry.size for entry in self.entries]) ** stage.mixture_temperature
        if not weights.sum():
            some = [name for name, teaches in zip(names, learned, strict=True) if teaches]
            raise ValueError(
                f"mixture: some samples of {', '.join(some)} have no subtask, and teach nothing in a stage whose losses"
                f" are {used}: name the shares to draw"
                if some
                else f"mixture: nothing is learned from any of {names} in a stage whose losses are {used}"
            )
        return weights / weights.sum()

    def batch(
        self,
        step: int,
        weights: np.ndarray,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> list[Draw]:
        """The draws of one of the accumulated batches of a step (`part` of `parts`) on a rank.

        first: the stage's first step, where its first window begins.
        """
        start = first + (step - first) // self.window * self.window
        identity = (start, world, parts, weights.tobytes())
        if self._last is None or self._last[0] != identity:
            self._last = identity, self._draw(start, weights, world, parts)
        entry, index, key = self._last[1][:, step - start, part, rank::world].tolist()
        return list(zip(entry, index, key, strict=True))

    def _draw(self, start: int, weights: np.ndarray, world: int, parts: int) -> np.ndarray:
        """Entry, index and key of a window's draws, i64[3, steps, accumulated batches, samples of all ranks]."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**63, start]))
        total = self.batch_size * world * parts
        count = self.window * total
        points = (np.arange(count) + rng.random()) / count
        chosen = np.searchsorted(np.cumsum(weights), points, side="right")
        chosen = chosen.clip(max=np.flatnonzero(weights)[-1])  # the last sum may be a little less than 1
        index, images, text = (np.empty(count, dtype=np.int64) for _ in range(3))
        for number in np.unique(chosen):
            here, entry = np.flatnonzero(chosen == number), self.entries[number]
            index[here] = _evenly(rng, entry.size, len(here))
            images[here] = np.broadcast_to(entry.images, entry.size)[index[here]]
            text[here] = np.broadcast_to(entry.text, entry.size)[index[here]]
        turn, place = _turns(chosen, index, images)
        order = np.lexsort((place, text, turn, images)).reshape(self.window, parts, total // parts)
        # neither does the order of steps follow their length, nor the ranks of a batch
        order = rng.permuted(order[rng.permutation(self.window)], axis=2)
        return np.stack([chosen[order], index[order], start * total + order])


def _evenly(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Indices i64[count] below size: any `size` that follow each other differ."""
    if count <= size:
        return rng.choice(size, count, replace=False)
    return np.resize(rng.permutation(size), count)


def _turns(chosen: np.ndarray, index: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns i64[draws] of samples with as many images, in each of which none occurs twice; and places f64 within all.

    Steps are made turn by turn, so that copies of a sample, which have the same length, do not meet in one.
    """
    turn, place = np.zeros(len(chosen), dtype=np.int64), np.zeros(len(chosen))
    for number in np.unique(images):
        kind = np.flatnonzero(images == number)
        parts = [kind[chosen[kind] == entry] for entry in np.unique(chosen[kind])]
        turns = max(-(-len(part) // len(np.unique(index[part]))) for part in parts)
        for part in parts:
            place[part] = np.arange(len(part)) / len(part)
            turn[part] = np.arange(len(part)) * turns // len(part)
    return turn, place


class MixtureSampler(Sampler[list[Draw]]):
    """The batches of the steps from `start` on, `accumulate` of each; workers prefetch, so a step decides its stage."""

    def __init__(
        self,
        mixture: Mixture,
        recipe: Recipe,
        *,
        num_steps: int,
        start: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.mixture, self.recipe = mixture, recipe
        self.num_steps, self.start, self.accumulate = num_steps, start, accumulate
        self.rank, self.world = rank, world
        # made here, so that a wrong name fails before the first step and not when its stage begins
        self.first = {stage.name: recipe.first_step(stage) for stage in recipe.reached}
        self.weights = {
            stage.name: mixture.weights(stage) for stage in recipe.reached if self.first[stage.name] < num_steps
        }

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.num_steps):
            stage = self.recipe.at(step).name
            weights, first = self.weights[stage], self.first[stage]
            for part in range(self.accumulate):
                yield self.mixture.batch(step, weights, self.rank, self.world, first, part, self.accumulate)
