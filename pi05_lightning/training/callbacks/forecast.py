"""Before anything is loaded: the memory that the run will need, what is free, and what would make it fit."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from pi05_lightning.data.datamodule import Pi05DataModule, datamodule_of
from pi05_lightning.data.mixture import Draw, Mixture
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import callbacks_of
from pi05_lightning.profiling.forecast import MARGIN, Batches, Memory, Setting, at_most, forecast, gib, largest, table
from pi05_lightning.profiling.free import free_memory
from pi05_lightning.ranks import by_first_rank, of_all_ranks
from pi05_lightning.recipe import Recipe, Stage
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.stages import StageSwitch
from pi05_lightning.types import Batch, Modality, Sample

SMALL = 0.1  # share of the free memory below which a line says enough
LOOKED_AT = 64  # batches among which a stage's largest is looked for
IMAGE_COLUMNS, CHARACTERS = 256, 4  # about: columns of an image, and characters of a column of text
CHECKPOINTING = {"activation_checkpointing": True}, "--model.activation_checkpointing true"

log = logging.getLogger(__name__)


class MemoryForecast(Callback):
    """Prints what a run will need and what is free, and stops what cannot fit with the cheapest change that would.

    What is free is the device's, or the machine's for all of its ranks; the least of all ranks. A run is stopped only
    where it would need more even if the forecast were 15 % too high.

    Args:
        force: go on all the same.
    """

    def __init__(self, force: bool = False) -> None:
        self.force = force

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Pi05Module)
        if stage == "fit":
            forecaster = Forecaster(trainer, pl_module, self.force)
            # each asks its own device: the first would take memory on all of them to ask, and does not see other nodes'
            least = min(of_all_ranks(forecaster.free()))
            by_first_rank(partial(forecaster.run, least))


class Forecaster:
    """Of the run that a trainer is about to begin or to resume."""

    def __init__(self, trainer: Trainer, module: Pi05Module, force: bool) -> None:
        self.trainer, self.module, self.force = trainer, module, force
        self.data = datamodule_of(trainer)
        switches, averages = callbacks_of(trainer, StageSwitch), callbacks_of(trainer, WeightAverage)
        self.recipe = switches[0].recipe if switches else module.recipe
        self.batches = LargestBatches(self.data, module, trainer, self.recipe)
        self.device = trainer.strategy.root_device
        self.setting = Setting(
            precision=str(trainer.precision_plugin.precision),
            accumulates=trainer.accumulate_grad_batches > 1,
            averages=any(average.decay is not None for average in averages),
            buckets=isinstance(trainer.strategy, DDPStrategy),
            device="cuda" if self.device.type == "cuda" else "cpu",
            shards=module.sharding.mesh.size(-1) if module.sharding else 1,
            validates=trainer.enable_validation,
        )

    def run(self, free: int) -> None:
        """Raises ValueError for what cannot fit.  free: bytes, for each rank."""
        if (bound := self.bound()) < SMALL * free:
            rank_zero_info(f"Memory: less than {gib(bound)} GiB; {gib(free)} GiB are free")
            return
        try:
            name, memory = largest(self.stages({}))
        except Exception as error:  # whatever is wrong with data or a head is told where it is used
            log.warning("there is no forecast of the memory (%s: %s)", type(error).__name__, error)
            return
        if memory.total < SMALL * free:
            rank_zero_info(f"Memory: {memory}; {gib(free)} GiB are free")
        else:
            where = f" of each of {self.trainer.world_size} ranks" if self.trainer.world_size > 1 else ""
            rank_zero_info("\n".join([f"Memory{where} in stage {name}, which needs most:", *table(memory, free)]))
        if memory.fits(free):
            if memory.total > free:
                log.warning("the run may or may not fit: its forecast may be %.0f %% too high", 100 * MARGIN)
            return
        if self.force:
            log.warning("the run needs more memory than is free, and goes on as --force says")
            return
        rank_zero_info("It does not fit. Looking for what would …")
        found = [*self.fitting(free), *self.ranks(memory, free)]
        remedy = f"It would fit with {', or with '.join(found)}" if found else "No change that is known here is enough"
        raise ValueError(
            f"the run needs {memory} in stage {name}, and {gib(free)} GiB are free. {remedy}. --force goes on"
        )

    def bound(self) -> float:
        """More than a run of a small model needs, with texts as long as they may be; of others nothing is known."""
        config, data, draws = self.module.config, self.data, self.module.flow_draws
        if config.backbone_type != "siglip_gemma":
            return math.inf
        patches = len(data.processor.cameras) * (config.vision.image_size // config.vision.patch_size) ** 2
        width = patches + data.language.max_tokens + config.horizon
        columns = data.batch_size * (width + (draws - 1) * config.horizon)
        logits = data.batch_size * data.language.max_tokens * config.vocab_size
        heads = sum(part.num_heads * part.depth for part in (config.vision, config.language, config.expert))
        return at_most(self.module.model, columns, width * heads, logits)

    def free(self) -> int:
        """Bytes for this rank."""
        found = free_memory(self.device)
        return found if self.device.type == "cuda" else found // self.trainer.num_devices

    def stages(self, changes: Mapping[str, Any], size: int | None = None) -> dict[str, Memory]:
        """What each stage needs, with other arguments of the module, and batches of another size."""
        module = variant(self.module, self.recipe, changes)
        setting = replace(self.setting, accumulates=self.setting.accumulates or size is not None)
        batches: Batches = partial(self.batches, size=size)
        insulate = module.knowledge_insulation
        with isolate_rng():
            return forecast(module.blueprint.blank, module.recipe, module.make_optimizer, batches, setting, insulate)

    def of(self, changes: Mapping[str, Any], size: int | None = None) -> Memory:
        """Of the stage that needs most."""
        return largest(self.stages(changes, size))[1]

    def fitting(self, free: int) -> Iterator[str]:
        """Of the changes with which the run fits, the cheapest, in words."""
        for changes, flags in self.methods():
            ways = [(changes, flags)] if changes else []
            if not self.module.blueprint.activation_checkpointing:
                ways.append((changes | CHECKPOINTING[0], f"{flags} {CHECKPOINTING[1]}".strip()))
            for way, words in ways or [(changes, flags)]:
                if way and (need := self.of(way)).total <= free:
                    yield f"{words} ({gib(need.total)} GiB)"
                    return
            for way, words in [({}, ""), *ways] if not changes else ways:
                if found := self.smaller(way, free):
                    size, need = found
                    parts = self.trainer.accumulate_grad_batches * (self.data.batch_size // size)
                    batch = f"--data.batch_size {size} --trainer.accumulate_grad_batches {parts}"
                    yield f"{words} {batch} ({gib(need.total)} GiB)".strip()
                    return

    def ranks(self, memory: Memory, free: int) -> Iterator[str]:
        """How many devices would do, each with as much memory, in words; for a GPU's, as ranks share a machine's."""
        if self.device.type != "cpu" and self.setting.shards == 1 and self.module.blueprint.base is None:
            for devices in (2, 4, 8, 16, 32, 64):
                copy = self.setting.copied(memory.weights) if self.setting.validates else 0
                if memory.divided(devices, copy).total <= free:
                    yield f"--trainer.devices {devices} --trainer.strategy fsdp2"
                    return

    def smaller(self, changes: Mapping[str, Any], free: int) -> tuple[int, Memory] | None:
        """The largest batch, a part of the one that is too large, with which it fits."""
        sizes = [size for size in range(self.data.batch_size - 1, 0, -1) if self.data.batch_size % size == 0]
        if not sizes or (least := self.of(changes, 1)).total > free:
            return None
        most = self.of(changes, sizes[0])
        for size in sizes:
            # what is held grows at most as a straight line between the two does
            share = (size - 1) / max(1, sizes[0] - 1)
            if least.total + share * (most.total - least.total) <= free:
                return size, self.of(changes, size)
        return 1, least

    def methods(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Changes of what is trained and kept, in the order in which they are to be tried, each with its flags."""
        yield {}, ""
        made = self.module.make_optimizer([nn.Parameter(torch.zeros(1))])
        if isinstance(made, torch.optim.AdamW):
            yield {"optimizer": eight_bits}, "--model.optimizer torchao.optim.AdamW8bit"
        adapters: dict[str, Any] = {} if self.module.blueprint.lora else {"lora": Lora()}
        flags = [] if self.module.blueprint.lora else ["--model.lora.rank 16"]
        if adapters:
            yield adapters, flags[0]
        if self.module.blueprint.base is None and self.module.sharding is None:
            for kind in ("int8", "nf4"):
                yield adapters | {"base": kind}, " ".join([*flags, f"--model.base {kind}"])


def eight_bits(groups: Any) -> Optimizer:
    from torchao.optim import AdamW8bit  # takes seconds to import

    return AdamW8bit(groups)


def variant(module: Pi05Module, recipe: Recipe, changes: Mapping[str, Any]) -> Pi05Module:
    """A module without memory that differs from another in some of its arguments, as far as these need memory."""
    options: dict[str, Any] = {
        "config": module.config,
        "optimizer": module.make_optimizer,
        "heads": module.blueprint.heads,
        "lora": module.blueprint.lora,
        "base": module.blueprint.base,
        "activation_checkpointing": module.blueprint.activation_checkpointing,
        "knowledge_insulation": module.knowledge_insulation,
    }
    other = Pi05Module(**(options | dict(changes)))
    other.follow(recipe)
    return other


class LargestBatches:
    """The largest batch that a stage of a run will have: of those that it draws first, made of its longest samples."""

    def __init__(self, data: Pi05DataModule, module: Pi05Module, trainer: Trainer, recipe: Recipe) -> None:
        self.data, self.module, self.trainer, self.recipe = data, module, trainer, recipe
        self.entries = data.train_samples.entries_with_lengths()
        self._read: dict[int, Sample] = {}

    def __call__(self, stage: Stage, size: int | None = None) -> Batch:
        data, parts = self.data, self.trainer.accumulate_grad_batches
        mixture = Mixture(self.entries, data.trained_by, size or data.batch_size, data.seed, data.length_window)
        weights = mixture.weights(stage)
        first = next(self.recipe.first_step(own) for own in self.recipe.stages if own.name == stage.name)
        draws = [
            mixture.batch(step, weights, 0, self.trainer.world_size, first, part, parts)
            for step in range(first, first + min(LOOKED_AT, stage.steps))
            for part in range(parts)
        ]
        counts = Counter(entry for entry, _, _ in max(draws, key=self._cost))
        samples = [self._longest(entry) for entry, count in counts.items() for _ in range(count)]
        return self.module.with_noise(data.train_samples.collate(samples))

    def _cost(self, draws: list[Draw]) -> int:
        """About how many columns a batch has, all rows together."""
        sizes = [self._sizes(entry) for entry, _, _ in draws]
        images = max(int(images[index]) for (images, _), (_, index, _) in zip(sizes, draws, strict=True))
        text = max(int(text[index]) for (_, text), (_, index, _) in zip(sizes, draws, strict=True))
        acting = sum(self.entries[entry].subset.modality is Modality.CONTINUOUS for entry, _, _ in draws)
        columns = images * IMAGE_COLUMNS + text // CHARACTERS
        return len(draws) * columns + acting * self.module.flow_draws * self.module.config.horizon

    def _sizes(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample of an entry, its images and the length of its text."""
        entry = self.entries[number]
        return np.broadcast_to(entry.images, entry.size), np.broadcast_to(entry.text, entry.size)

    def _longest(self, number: int) -> Sample:
        if number not in self._read:
            images, text = self._sizes(number)
            index = int(np.lexsort((text, images))[-1])
            self._read[number] = self.data.train_samples[number, index, index]
        return self._read[number]
