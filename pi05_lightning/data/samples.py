"""What is drawn from: the sources' frames as samples, and what becomes of those that turn out bad."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pi05_lightning.data.augment import Augmentation
from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.errors import BadFrame, BadSample
from pi05_lightning.data.mixture import Draw, Entry, MixtureSampler
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.sources.base import Sizes, Source
from pi05_lightning.files.ranges import check_range
from pi05_lightning.types import Batch, Drawn, Frame, Modality, Sample, Subset

REPLACEMENTS = 16  # bad samples in a row after which a source has hardly any that are good
LONGEST = 4  # lengths of an entry's texts that are tried before training
SPREAD = 3  # samples of an entry that are tried besides
FIRST_DRAWS = 200  # a share of fewer draws says little

log = logging.getLogger(__name__)


class Samples(Dataset[Sample]):
    """Draws to samples: entry e, index i of what that entry can use, key. augmentation: drawn with every batch.

    training: some samples leave out what a policy may also lack, and others take the place of bad ones.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        processor: Processor,
        max_questions: int = 1,
        augmentation: Augmentation | None = None,
        training: bool = False,
    ) -> None:
        self.training = training
        self.sources, self.processor, self.max_questions = sources, processor, max_questions
        self.augmentation = augmentation
        self.subsets = [
            Subset(name, modality)
            for name, source in sources.items()
            for modality in Modality
            if len(source.indices(modality)) and not (modality is Modality.FAST and processor.fast is None)
        ]
        self.indices = [sources[subset.source].indices(subset.modality) for subset in self.subsets]

    @cached_property
    def entries(self) -> list[Entry]:
        """What can be drawn, without the lengths of samples."""
        found = []
        for subset, indices in zip(self.subsets, self.indices, strict=True):
            lacking, absent = self._without_subtask(subset)
            found.append(Entry(subset, len(indices), lacking=lacking, absent=absent))
        return found

    def entries_with_lengths(self) -> list[Entry]:
        """The entries with their samples' lengths, from the sources' tables: no image is read for it."""
        return [self._with_lengths(entry) for entry in self.entries]

    def spread(self, entry: int) -> set[int]:
        """A few indices of an entry, from its first to its last."""
        return set(evenly_spaced(len(self.indices[entry]), SPREAD).tolist())

    def longest(self, entry: int) -> set[int]:
        """Indices of an entry with the longest texts, by the sources' tables: characters are not quite tokens."""
        size = len(self.indices[entry])
        _, first = np.unique(np.broadcast_to(self._with_lengths(self.entries[entry]).text, size), return_index=True)
        return set(first[-LONGEST:].tolist())

    def alike(self, entry: int) -> bool:
        """Whether each of an entry's samples has images, and teaches a subtask if any does, by its source's tables.

        What there is to learn from one is then there in all of them, as far as tokens and actions go.
        """
        subset, language = self.subsets[entry], self.processor.language
        if (sizes := self._sizes(subset)) is None:
            return False
        if self._may_say_subtask(subset):
            given = np.asarray(sizes.subtask) > 0
            taught = given & sizes.taught
            if taught.any() and (language.task_only_share or not taught.all()):
                return False
            if given.any() and language.fast_share and subset.modality is Modality.CONTINUOUS:
                return False
        return bool(np.all(sizes.images))

    def _without_subtask(self, subset: Subset) -> tuple[frozenset[str], frozenset[str]]:
        """The loss terms of which some, and of which all, of a subset's samples have no target for want of a subtask.

        That is as far as is known. What is hidden by chance does not count.
        """
        if not self._may_say_subtask(subset) or (sizes := self._sizes(subset)) is None:
            return frozenset(), frozenset()
        given = np.asarray(sizes.subtask) > 0
        has = {"subtask": given & sizes.taught} | ({"fast": given} if subset.modality is Modality.CONTINUOUS else {})
        lacking = frozenset(term for term, of in has.items() if not of.all())
        return lacking, frozenset(term for term in lacking if not has[term].any())

    def _sizes(self, subset: Subset) -> Sizes | None:
        """By the source's tables; None where it says nothing of them."""
        source = self.sources[subset.source]
        return None if type(source).sizes is Source.sizes else source.sizes(subset.modality)

    def _may_say_subtask(self, subset: Subset) -> bool:
        """Whether its samples may have a subtask to be said before actions."""
        saying = self.processor.language.saying_subtasks
        return subset.modality in saying and subset.modality is not Modality.HL_SUBTASK

    def address(self, entry: int, index: int) -> str:
        """Dataset, episode and frame of an entry's index, for messages."""
        return self.sources[self.subsets[entry].source].address(int(self.indices[entry][index]))

    def _with_lengths(self, entry: Entry) -> Entry:
        source, modality = entry.subset.source, entry.subset.modality
        sizes, condition_on = self.sources[source].sizes(modality), self.processor.language.condition_on
        text = np.asarray(sizes.task) + sizes.answers
        if modality is Modality.HL_SUBTASK or condition_on == "both":
            text = text + sizes.subtask
        elif condition_on == "subtask":
            text = np.where(np.asarray(sizes.subtask) > 0, sizes.subtask, text)
        return replace(entry, images=np.atleast_1d(sizes.images), text=np.atleast_1d(text))

    def __getitem__(self, draw: Draw) -> Sample:
        """The sample drawn; where it is bad and its source says so, another of the same entry, which the key decides.

        Raises BadSample, with its address, for a bad one of other sources, and when there is hardly a good one.
        """
        entry, index, key = draw
        skipped: list[str] = []
        others = np.random.Generator(np.random.Philox(key=[key % 2**63, 2]))
        while True:
            try:
                sample = self._read(entry, index, key)
                return replace(sample, skipped=tuple(skipped)) if skipped else sample
            except BadSample as error:
                if self.sources[self.subsets[entry].source].on_bad_sample != "skip":
                    raise BadSample(f"{error}, or leave such data out with on_bad_sample: skip") from error
                skipped.append(str(error))
                if len(skipped) == REPLACEMENTS:
                    raise BadSample(f"{REPLACEMENTS} samples in a row are bad, the last: {error}") from error
            index = int(others.integers(len(self.indices[entry])))

    def _read(self, entry: int, index: int, key: int) -> Sample:
        subset, frame = self.subsets[entry], int(self.indices[entry][index])
        source = self.sources[subset.source]
        try:
            sample = self.processor.sample(source[frame], subset, key, self.max_questions, self.training)
            return replace(sample, frame=frame)
        except BadSample:
            raise  # it carries its address
        except BadFrame as error:
            raise BadSample(f"{source.address(frame)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{source.address(frame)}: {error}") from error

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch, what the host may know of it, and what is to be done to its images.

        What is measured is not replaced. A batch of bad samples alone has rows, but was drawn from nothing.
        """
        good = [sample for sample in samples if self.training or not sample.skipped]
        batch = self.processor.collate(good or samples)
        batch.drawn = Drawn(
            names=dict(Counter(str(sample.subset) for sample in good)),
            text_tokens=sum(len(sample.tokens) for sample in good),
            frames=tuple((sample.subset.source, sample.frame) for sample in good),
            skipped=tuple(problem for sample in samples for problem in sample.skipped[: None if self.training else 1]),
        )
        if self.augmentation is None:
            return batch
        return self.augmentation.draw(batch, self.processor.cameras, self.processor.tokenizer.loc_ids)


@dataclass(frozen=True)
class Observed:
    """Frames of a source as they were recorded, for a policy to act on.

    places: of each, see `Source.place`.  keys: of each, its number in the source; they seed the noise.
    """

    source: str
    frames: list[Frame]
    places: list[dict[str, int | float]]
    keys: list[int]


class Observations(Dataset[tuple[Frame, dict[str, int | float], int] | None]):
    """Numbers of a source's frames to `Observed`, through `collate`; a bad frame of a source that skips is left out."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> tuple[Frame, dict[str, int | float], int] | None:
        try:
            return self.source[index], self.source.place(index), index
        except BadSample as error:
            if self.source.on_bad_sample != "skip":
                raise
            log.warning("left out: %s", error)
            return None

    def collate(self, items: Sequence[tuple[Frame, dict[str, int | float], int] | None]) -> Observed:
        frames, places, keys = zip(*good, strict=True) if (good := [x for x in items if x]) else ((), (), ())
        return Observed(self.source.name, list(frames), list(places), list(keys))


class BadSampleCount:
    """Bad samples among the draws so far; adding to it raises ValueError when they are more than a share of them."""

    def __init__(self, max_share: float) -> None:
        check_range("data.max_bad_share", max_share, 0, 1)
        self.max_share = max_share
        self.bad = self.drawn = 0

    def add(self, drawn: Drawn) -> None:
        self.drawn += sum(drawn.names.values()) + len(drawn.skipped)
        self.bad += len(drawn.skipped)
        for problem in drawn.skipped:
            log.warning("left out and replaced by another sample: %s", problem)
        if drawn.skipped and self.bad > self.max_share * max(self.drawn, FIRST_DRAWS):
            raise ValueError(
                f"{self.bad} of the first {self.drawn} samples are bad, more than data.max_bad_share"
                f" {self.max_share:g} allows (of at least {FIRST_DRAWS}); the last: {drawn.skipped[-1]}"
            )


class TrainLoader(DataLoader[Any]):
    """The batches of optimizer steps, one step after the other; it reads a step's ahead and says what all of them hold.

    In the main process, when a batch is handed over, it also counts what was skipped.

    length: batches of the whole run, also when it starts later: Lightning counts from 0.
    start: the step to go on with and the batches of a step, asked whenever it is gone through, which is at each epoch.
    with_noise: a batch on the host with noise and flow time.
    counts: of such a batch, the elements of each loss term, i64[terms].
    waited: seconds that whoever goes through it has waited for batches.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: MixtureSampler,
        bad: BadSampleCount,
        *,
        length: int,
        start: Callable[[], tuple[int, int]],
        with_noise: Callable[[Batch], Batch],
        counts: Callable[[Batch], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, **options)
        self.sampler_of_steps, self.bad, self.length, self.start = sampler, bad, length, start
        self.with_noise, self.counts = with_noise, counts
        self.waited = 0.0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler = self.sampler_of_steps
        sampler.start, sampler.accumulate = self.start()
        batches = super().__iter__()
        try:
            while step := self._next(batches, sampler.accumulate):
                step = [self.with_noise(batch) for batch in step]
                counts = torch.stack([self.counts(batch) for batch in step]).sum(0)
                while step:
                    batch = step.pop(0)
                    batch.step_counts = counts
                    self.bad.add(batch.drawn)
                    yield batch
        except BadSample as error:  # a worker's comes with the worker's traceback
            raise BadSample(str(error).rpartition("BadSample: ")[2]) from error

    def _next(self, batches: Iterator[Any], count: int) -> list[Any]:
        start = perf_counter()
        step = list(islice(batches, count))
        self.waited += perf_counter() - start
        return step
