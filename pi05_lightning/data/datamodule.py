"""The LightningDataModule: sources and a mixture to batches; its state is the number of batches seen."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker as ProcessedTracker
from torch.utils.data import DataLoader, Dataset

from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.mixture import Draw, Entry, Mixture, MixtureSampler
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.sources.base import Source, SourceConfig, Split
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.recipe import Recipe
from pi05_lightning.types import Modality, Sample, Shapes


def datamodule_of(trainer: Trainer) -> Pi05DataModule:
    """The trainer's data; ValueError when it was given none of ours."""
    datamodule = getattr(trainer, "datamodule", None)  # set by fit and its like, not declared by Trainer
    if not isinstance(datamodule, Pi05DataModule):
        raise ValueError("Pi05Module trains on a Pi05DataModule: trainer.fit(module, datamodule)")
    return datamodule


class Samples(Dataset[Sample]):
    """Draws to samples: entry e, index i of what that entry can use, key."""

    def __init__(self, sources: dict[str, Source], processor: Processor, max_questions: int = 1) -> None:
        self.sources, self.processor, self.max_questions = sources, processor, max_questions
        self.names = [
            f"{name}/{modality}"
            for name, source in sources.items()
            for modality in Modality
            if len(source.indices(modality)) and not (modality is Modality.FAST and processor.fast is None)
        ]
        self.indices = [self.sources[self.of(name)[0]].indices(self.of(name)[1]) for name in self.names]

    @staticmethod
    def of(name: str) -> tuple[str, Modality]:
        source, _, modality = name.rpartition("/")
        return source, Modality(modality)

    @property
    def entries(self) -> list[Entry]:
        return [Entry(name, len(indices)) for name, indices in zip(self.names, self.indices, strict=True)]

    def __getitem__(self, draw: Draw) -> Sample:
        entry, index, key = draw
        name, modality = self.of(self.names[entry])
        source = self.sources[name]
        frame = int(self.indices[entry][index])
        try:
            number = list(self.sources).index(name)
            return self.processor.sample(source[frame], modality, name, key, number, self.max_questions)
        except BadSample:
            raise  # it carries its address
        except ValueError as error:
            raise ValueError(f"{source.address(frame)}: {error}") from error


class Pi05DataModule(LightningDataModule):
    """Multimodal data for π0.5.

    Which sources and modalities are drawn, and how often, is the recipe's `mixture` (see `StageSwitch`).

    Args:
        sources: by name. What a source can serve as (`source/modality`) are the names that mixtures and metrics use.
        batch_size: samples per batch and rank.
        tokenizer: `tiny` for the shipped one, or the folder or Hub id of PaliGemma's.
        fast: folder of a FAST tokenizer (`pi05 tokenizer`); without it there are no `fast_robot_actions`.
        language: prompts, and what actions are conditioned on.
        num_workers: loader processes.
        seed: of the draws.
        val_samples: at most this many validation samples per `source/modality`, evenly spaced.
        shapes: sizes that samples are made to; by default those of the module being trained.
    """

    def __init__(
        self,
        sources: dict[str, SourceConfig],
        batch_size: int = 32,
        tokenizer: str = "tiny",
        fast: Path | str | None = None,
        language: Language = Language(),  # noqa: B008 - frozen, and its fields are what --help shows
        num_workers: int = 2,
        seed: int = 0,
        val_samples: int = 256,
        shapes: Shapes | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise ValueError("data.sources is empty: name at least one source")
        self.configs, self.batch_size, self.tokenizer_name = sources, batch_size, tokenizer
        self.fast_path, self.language, self.num_workers, self.seed = fast, language, num_workers, seed
        self.val_samples, self._shapes = val_samples, shapes
        self.recipe: Recipe | None = None
        self.opened: dict[Split, dict[str, Source]] = {}
        self._batches_seen = 0

    @property
    def shapes(self) -> Shapes:
        if self._shapes is not None:
            return self._shapes
        if self.trainer is None:
            raise ValueError("Pi05DataModule without a trainer needs `shapes`, e.g. shapes=config.shapes")
        return cast("Any", self.trainer.lightning_module).config.shapes

    def sources(self, split: Split) -> dict[str, Source]:
        """The sources of a split, opened on first use."""
        if split not in self.opened:
            self.opened[split] = {name: c.open(name, split, self.shapes) for name, c in self.configs.items()}
        return self.opened[split]

    @cached_property
    def processor(self) -> Processor:
        """What makes samples and batches, and goes into every checkpoint."""
        cameras = dict.fromkeys(camera for s in self.sources("train").values() for camera in s.camera_names)
        robots = {name: config.robot() for name, config in self.configs.items()}
        return Processor(
            shapes=self.shapes,
            tokenizer=TextTokenizer.load(self.tokenizer_name),
            cameras=list(cameras),
            robots={name: robot for name, robot in robots.items() if robot is not None},
            language=self.language,
            fast=FastTokenizer.load(self.fast_path) if self.fast_path else None,
        )

    def prepare_data(self) -> None:
        for split in ("train", "val"):
            for source in self.sources(split).values():
                source.prepare()

    # --- training

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        if trainer.max_steps == -1:
            raise ValueError("an endless run: set trainer.max_steps, or add the StageSwitch callback, which knows it")
        accumulate = trainer.accumulate_grad_batches
        samples = Samples(self.sources("train"), self.processor, self.language.questions_per_sample)
        sampler = MixtureSampler(
            Mixture(samples.entries, self.batch_size, self.seed),
            self.recipe,
            num_batches=trainer.max_steps * accumulate,
            start=self._batches_seen,
            batches_per_step=accumulate,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return self._loader(samples, batch_sampler=sampler)

    def state_dict(self) -> dict[str, int]:
        """Training batches that were trained on; the loader is ahead of it by what its workers prefetched."""
        assert self.trainer is not None
        progress = cast("ProcessedTracker", self.trainer.fit_loop.epoch_loop.batch_progress.total)
        return {"batches_seen": progress.processed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches_seen = state_dict["batches_seen"]

    # --- validation: every modality of every source by itself, the same samples and noise every time

    @cached_property
    def _validation(self) -> Samples:
        return Samples(self.sources("val"), self.processor)

    @property
    def validation_names(self) -> list[str]:
        """`source/modality` of each validation loader."""
        return self._validation.names

    def val_dataloader(self) -> list[DataLoader[Any]]:
        loaders = []
        for number, entry in enumerate(self._validation.entries):
            chosen = np.linspace(0, entry.size - 1, min(entry.size, self.val_samples)).astype(int)
            draws = [(number, int(index), int(index)) for index in chosen]
            loaders.append(self._loader(self._validation, sampler=draws, batch_size=self.batch_size))
        return loaders

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, samples: Samples, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            samples,
            num_workers=self.num_workers,
            collate_fn=self.processor.collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            **options,
        )
