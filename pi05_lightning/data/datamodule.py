"""The LightningDataModule: sources and a mixture to batches. Where it goes on is the run's step."""

from __future__ import annotations

import copy
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from pi05_lightning.data.augment import Augmentation, augment
from pi05_lightning.data.clock import align, most_batches, start
from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.differences import Seen
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.mixture import Mixture, MixtureSampler, TrainedBy
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.samples import BadSampleCount, Observations, Observed, Samples, TrainLoader
from pi05_lightning.data.sources.base import Source, SourceConfig
from pi05_lightning.data.sources.same_robot import check_same_robot
from pi05_lightning.data.split import Split
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.data.workers import leave_signals_to_the_run
from pi05_lightning.files.ranges import check_range
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.ranks import by_first_rank, together
from pi05_lightning.recipe import Recipe, Stage
from pi05_lightning.types import Batch, Drawn, Modality, Shapes, Subset

log = logging.getLogger(__name__)


def datamodule_of(trainer: Trainer) -> Pi05DataModule:
    """The trainer's data; ValueError when it was given none of ours."""
    datamodule = getattr(trainer, "datamodule", None)  # set by fit and its like, not declared by Trainer
    if not isinstance(datamodule, Pi05DataModule):
        raise ValueError("Pi05Module trains on a Pi05DataModule: trainer.fit(module, datamodule)")
    return datamodule


class Pi05DataModule(LightningDataModule):
    """Multimodal data for π0.5.

    Which sources and modalities are drawn, and how often, is the recipe's `mixture` (see `StageSwitch`).

    Args:
        sources: the datasets, by name. What a source can serve as (`source/modality`) are the names that mixtures and
            metrics use.
        batch_size: samples per batch and rank.
        tokenizer: `tiny` for the shipped one, or the folder or Hub id of PaliGemma's.
        fast: folder of a FAST tokenizer (`pi05 tokenizer`); without it there are no `fast_robot_actions`.
        language: prompts, and what actions are conditioned on.
        num_workers: loader processes.
        seed: of the draws.
        length_window: optimizer steps whose samples are drawn together and sorted by length, so that there is little
            padding; shares hold in every window. 1: they hold in every step, whatever the padding.
        max_bad_share: training stops when a larger share of a source's frames, or of the samples drawn (of 200 at
            least), is bad. Of sources with `on_bad_sample: skip`: others stop at the first.
        val_samples: at most this many validation (or test) samples per `source/modality`, evenly spaced.
        augmentation: what happens to training images, on the device; none for nothing.
        shapes: sizes that samples are made to; by default those of the module being trained.
        cameras: names in the order in which the model numbers them, also of some that no source has; by default that of
            the sources. A model that keeps something for each camera needs that of the weights that it begins with.
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
        length_window: int = 64,
        max_bad_share: float = 0.05,
        val_samples: int = 256,
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008 - frozen
        shapes: Shapes | None = None,
        cameras: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer validation samples than ranks
        if not sources:
            raise ValueError("data.sources is empty: name at least one source")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("length_window", length_window, 1),
            ("val_samples", val_samples, 1),
            ("num_workers", num_workers, 0),
        ):
            check_range(f"data.{name}", value, least)
        self.configs, self.batch_size, self.tokenizer_name = sources, batch_size, tokenizer
        self.fast_path, self.language, self.num_workers, self.seed = fast, language, num_workers, seed
        self.val_samples, self.augmentation, self._shapes = val_samples, augmentation, shapes
        self.cameras = cameras
        self.length_window, self.bad_samples = length_window, BadSampleCount(max_bad_share)
        self.recipe: Recipe | None = None
        self.opened: dict[Split, dict[str, Source]] = {}
        self._mixture: Mixture | None = None
        self._given: Processor | None = None
        self._unprepared: Exception | None = None

    @property
    def _model(self) -> Any:
        """The model that is trained on it, None without a trainer."""
        return None if self.trainer is None else cast("Any", self.trainer.lightning_module).model

    @property
    def _ranks(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def shapes(self) -> Shapes:
        if self._shapes is not None:
            return self._shapes
        if self._model is None:
            raise ValueError("Pi05DataModule without a trainer needs `shapes`, e.g. shapes=config.shapes")
        return self._model.config.shapes

    def sources(self, split: Split) -> dict[str, Source]:
        """The sources of a split, opened on first use; of `test`, those that have such a part.

        Raises ValueError when there are none, and for what a source refuses.
        """
        if split not in self.opened:
            opened = {n: c.open(n, split, self.shapes) for n, c in self.configs.items() if split in c.splits}
            if split == "test":
                opened = {name: source for name, source in opened.items() if len(source)}
                without = sorted(set(self.configs) - set(opened))
                if not opened:
                    raise ValueError(
                        f"data.sources: none of {', '.join(without)} declares a test part, so there is nothing to test"
                        ' on. Declare one, as `splits` in a LeRobot dataset\'s meta/info.json: {"test": "90:100"}, or'
                        " measure the validation data: pi05 validate"
                    )
                if without:
                    names = ", ".join(without)
                    log.warning("data.sources: no test part is declared in %s, so nothing of that is tested on", names)
            for name, source in opened.items() if split != "train" else ():
                source.leave_out_unexplained(self.processor.robots.get(name))
            self.opened[split] = opened
        return self.opened[split]

    @property
    def processor(self) -> Processor:
        """What makes samples and batches, and goes into every checkpoint."""
        return self._given or self.own_processor

    def measure_with(self, processor: Processor | None) -> None:
        """Make samples with what the weights were trained with, whatever the data's own are; None: with the data's."""
        if processor is not None:
            own = self.own_processor
            ours = replace(
                own.language, prompts=processor.language.prompts, condition_on=processor.language.condition_on
            )
            processor = copy.copy(processor)
            # no checkpoint has the one, and the other's limits and shares are the run's
            processor.targets, processor.language = own.targets, ours
        self._given = processor
        for samples in ("validation", "_test"):
            vars(self).pop(samples, None)

    @cached_property
    def own_processor(self) -> Processor:
        """That of the data: its statistics are the training parts', its text and tokenizers those of the options."""
        found = [camera for source in self.sources("train").values() for camera in source.camera_names]
        robots: dict[str, Robot] = {}
        shared: dict[str, tuple[str, Source]] = {}
        for name, source in self.sources("train").items():
            if source.same_robot_as is not None:
                shared[name] = source.same_robot_as, source
                continue
            robot = source.checked_robot()
            if robot is not None:
                robots[name] = replace(robot, looks=source.looks())
        for name, (other, source) in shared.items():
            if other not in robots:
                raise ValueError(
                    f"data.sources.{name}: same_robot_as {other!r} names no source with a robot of its own; there are"
                    f" {', '.join(robots) or 'none'}"
                )
            check_same_robot(source, self.sources("train")[other], robots[other])
            source.leave_out_unexplained(robots[other])
            if (own := source.robot()) is not None:
                robots[other] = robots[other].with_data_of(own)
        robots |= {name: replace(robots[other], same_as=other) for name, (other, _) in shared.items()}
        for name, robot in robots.items():
            if robot.acts and self._fast and (unfit := self._fast.misfit(self.shapes.horizon, robot.action_dim)):
                raise ValueError(
                    f"data.fast {self.fast_path} {unfit} (data.sources.{name}): fit one with `pi05 tokenizer` on this"
                    " run's YAML"
                )
        return Processor(
            shapes=self.shapes,
            tokenizer=self._tokenizer,
            cameras=list(dict.fromkeys([*self.cameras, *found])),
            robots=robots,
            language=self.language,
            fast=self._fast,
            targets=self._model.targets if self._model else {},
        )

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer.load(self.tokenizer_name)

    @cached_property
    def _fast(self) -> FastTokenizer | None:
        return FastTokenizer.load(self.fast_path) if self.fast_path else None

    def check_mixtures(self, recipe: Recipe) -> None:
        """ValueError for a name in a stage's mixture that no data can have; nothing is opened."""
        known = [str(Subset(name, modality)) for name in self.configs for modality in Modality]
        for stage in recipe.reached:
            for name in stage.mixture:
                if name not in known:
                    raise ValueError(
                        f"stage {stage.name}, mixture: there is no {name}{suggestion(name, known)}; data.sources are"
                        f" {', '.join(self.configs)}, each with what its data have of {', '.join(Modality)}"
                    )

    def prepare_data(self) -> None:
        self._unprepared = None
        try:
            _ = self._tokenizer, self._fast  # before the datasets, which take longer to open
            for split in ("train", self.evaluated):
                for source in self.sources(split).values():
                    source.prepare()
        except Exception as error:
            if self._ranks == 1:
                raise
            self._unprepared = error  # the other ranks wait, and hear of it in `setup`

    def setup(self, stage: str) -> None:
        """Open the data on every rank of several. ValueError on all of them for what fails, or differs, on one."""
        if self.trainer is None or self._ranks == 1:
            return
        if self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "the loaders give each rank its part of the samples, and Lightning would divide that once more: pass"
                " Trainer(use_distributed_sampler=False)"
            )
        with together():
            if self._unprepared is not None:
                raise self._unprepared
            read: tuple[Split, ...] = "train", self.evaluated
            mine = Seen.of(self.own_processor.robots, {split: self.sources(split) for split in read})
        first = by_first_rank(lambda: mine)
        with together():
            if differing := mine.differences(first):
                raise ValueError(
                    f"rank {dist.get_rank()} on {socket.gethostname()} sees other data than the first rank"
                    f" ({'; '.join(differing)}): copy the dataset anew, or restore it"
                )

    # --- training

    @cached_property
    def train_samples(self) -> Samples:
        """What a mixture draws from."""
        questions = self.language.questions_per_sample
        return Samples(self.sources("train"), self.processor, questions, self.augmentation, training=True)

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        if trainer.max_steps == -1:
            raise ValueError("an endless run: set trainer.max_steps, or add the StageSwitch callback, which knows it")
        align(trainer)
        self._check_rejects()
        samples = self.train_samples
        entries = samples.entries_with_lengths() if self.length_window > 1 else samples.entries
        self._mixture = Mixture(entries, self.trained_by, self.batch_size, self.seed, self.length_window)
        for stage in self.recipe.reached if self.recipe else ():
            self.tells_advantage(stage)
        sampler = MixtureSampler(
            self._mixture,
            self.recipe or Recipe.of(pretrain_steps=0),
            num_steps=trainer.max_steps,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        options = self._loader_options | {"collate_fn": samples.collate}
        module = cast("Any", trainer.lightning_module)
        return TrainLoader(
            samples,
            sampler,
            self.bad_samples,
            length=most_batches(trainer),
            start=partial(start, trainer),
            with_noise=module.with_noise,
            counts=module.model.counts,
            **options,
        )

    @property
    def trained_by(self) -> TrainedBy:
        """What each loss term of the model may be learned from, with these prompts."""
        return self.processor.language.trained_by(self._model.terms)

    def drawn_entries(self, stage: Stage) -> list[int]:
        """Which of the training samples' entries a stage of this run draws; none before training has begun."""
        return [] if self._mixture is None else np.flatnonzero(self._mixture.weights(stage)).tolist()

    def drawn(self, stage: Stage) -> set[Modality]:
        """The modalities that a stage of this run draws samples of; none before training has begun."""
        return {self.train_samples.subsets[number].modality for number in self.drawn_entries(stage)}

    def fed(self, stage: Stage) -> set[str]:
        """The model's loss terms that something which a stage of this run draws can train."""
        entries, trained_by = self.train_samples.entries, self.trained_by
        drawn = [entries[number] for number in self.drawn_entries(stage)]
        return {term for term in trained_by if any(entry.teaches(term, trained_by) for entry in drawn)}

    def tells_advantage(self, stage: Stage) -> bool:
        """Whether the actions that a stage of this run draws are said to be better than expected, or not.

        Raises ValueError where those of some sources are and others' are not: what is missing must not be learned as
        left out. And where their labels are returns alone, of which no loss of the stage can learn.
        """
        subsets = [self.train_samples.subsets[number] for number in self.drawn_entries(stage)]
        names = {s.source for s in subsets if s.modality in (Modality.FAST, Modality.CONTINUOUS)}
        told = {name for name in names if self.sources("train")[name].tells_advantage}
        returns = {name for name in names - told if self.sources("train")[name].tells_return}
        if returns and not any(stage.losses.others.values()):
            raise ValueError(
                f"stage {stage.name}: the labels of data.sources.{min(returns)} are returns, which only a value learns:"
                " give it those that `pi05 value label` wrote, or none"
            )
        if told and told != names:
            raise ValueError(
                f"stage {stage.name}: it draws actions from data.sources.{min(told)}, whose labels say their advantage,"
                f" and from {', '.join(sorted(names - told))}, which has no labels of it: give it some (`pi05 value"
                " label`, or `labels: positive` for demonstrations), or leave it out of the stage's mixture"
            )
        return bool(told)

    def addresses(self, drawn: Drawn) -> list[str]:
        """Where the samples of a training batch are: dataset, episode and frame."""
        sources = self.sources("train")
        return [sources[name].address(frame) for name, frame in drawn.frames]

    def _check_rejects(self) -> None:
        for name, source in self.sources("train").items():
            bad = source.rejects.frames if source.rejects else 0
            if bad > self.bad_samples.max_share * (bad + len(source)):
                raise ValueError(
                    f"data.sources.{name}: {bad} of {bad + len(source)} frames are bad (warned of above), more than"
                    f" data.max_bad_share {self.bad_samples.max_share:g} allows: mend them, or raise it"
                )

    def on_after_batch_transfer(self, batch: Batch | Observed, dataloader_idx: int) -> Batch | Observed:
        """Augment on the device what training drew; validation draws nothing."""
        return augment(batch) if isinstance(batch, Batch) else batch

    def state_dict(self) -> dict[str, int]:
        """Where it goes on is not here: it is the run's step."""
        return {"bad": self.bad_samples.bad, "drawn": self.bad_samples.drawn}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.bad_samples.bad, self.bad_samples.drawn = state_dict.get("bad", 0), state_dict.get("drawn", 0)

    # --- validation and test: every modality of every source by itself, the same samples and noise every time

    @property
    def evaluated(self) -> Literal["val", "test"]:
        """The part that is measured: the test part in Lightning's test loop, otherwise the validation part."""
        return "test" if self.trainer is not None and self.trainer.testing else "val"

    @cached_property
    def validation(self) -> Samples:
        return Samples(self.sources("val"), self.processor)

    @cached_property
    def _test(self) -> Samples:
        return Samples(self.sources("test"), self.processor)

    @property
    def evaluated_subsets(self) -> list[Subset]:
        """What each loader of the part that is measured is of."""
        return (self._test if self.evaluated == "test" else self.validation).subsets

    @property
    def empty_subsets(self) -> list[Subset]:
        """What there is training data but none to measure of, and modalities that no source has."""
        train, evaluated = Samples(self.sources("train"), self.processor).subsets, self.evaluated_subsets
        found = {subset.modality for subset in (*train, *evaluated)}
        absent = [Subset("", modality) for modality in Modality if modality not in found]
        return [*(subset for subset in train if subset not in evaluated), *absent]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._loaders(self.validation)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._loaders(self._test)

    def _loaders(self, samples: Samples) -> list[DataLoader[Any]]:
        self.check_ranks([entry.size for entry in samples.entries])
        loaders = []
        for number, entry in enumerate(samples.entries):
            draws = [(number, index, index) for index in self._chosen(entry.size)]
            # a generator of its own: a loader draws its workers' seed, which is not to disturb training's numbers
            own = torch.Generator().manual_seed(self.seed)
            options = self._loader_options | {"batch_size": self.batch_size, "generator": own}
            loaders.append(DataLoader(samples, sampler=draws, collate_fn=samples.collate, **options))
        return loaders

    def _chosen(self, size: int) -> list[int]:
        """Which of so many samples are looked at, and of these the part of this rank."""
        rank = self.trainer.global_rank if self.trainer else 0
        return evenly_spaced(size, self.val_samples)[rank :: self._ranks].tolist()

    def check_ranks(self, sizes: Sequence[int]) -> None:
        """ValueError where a rank has nothing to look at of parts of these sizes: the others would wait for it."""
        most = min(max(sizes, default=0), self.val_samples)
        if 0 < most < self._ranks:  # of nothing at all, every rank does as much
            raise ValueError(
                f"there are {self._ranks} ranks, and at most {most} samples of a validation part to look at: give"
                f" data.val_samples of {self._ranks} or more (it is {self.val_samples}), hold out more, or use fewer"
                " devices"
            )

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Per source with actions, the frames whose actions validation looks at, as they were recorded (`Observed`)."""
        loaders = []
        sources = self.predicted_sources.values()
        self.check_ranks([len(source.indices(Modality.CONTINUOUS)) for source in sources])
        for source in sources:
            data, indices = Observations(source), source.indices(Modality.CONTINUOUS)
            chosen = indices[self._chosen(len(indices))].tolist()
            options = self._loader_options | {"collate_fn": data.collate, "batch_size": self.batch_size}
            loaders.append(DataLoader(data, sampler=chosen, **options))
        return loaders

    @property
    def predicted_sources(self) -> dict[str, Source]:
        """What there are actions to predict of. ValueError where there are none."""
        sources = self.sources("val")
        found = {name: source for name, source in sources.items() if len(source.indices(Modality.CONTINUOUS))}
        if not found:
            raise ValueError("there is nothing to predict: no validation sample of data.sources has actions")
        return found

    @property
    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": False,
            "worker_init_fn": leave_signals_to_the_run,
        }
