"""How fast training runs: samples and tokens per second, the share of the hardware's rate, and memory."""

from __future__ import annotations

import logging
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import values_of
from pi05_lightning.module import Pi05Module
from pi05_lightning.profiling.cost import parameters_of
from pi05_lightning.profiling.rate import peak_rate
from pi05_lightning.profiling.step import training_loss
from pi05_lightning.recipe import Stage
from pi05_lightning.types import Batch

log = logging.getLogger(__name__)

GB = 1e9
USUAL_SHARES = 0.3, 0.9
"""Of the best rate, what the demo's run and the desk's logged as `throughput/hardware_share`, nine times of ten."""


@dataclass
class Count:
    """What was trained on since the last time it was logged."""

    start: float
    first_step: int
    samples: int = 0
    tokens: Tensor | float = 0.0
    cost: float = 0.0
    """See `Work`."""


@dataclass(frozen=True)
class Work:
    """What batches cost nearly, in FLOPs, from their shapes alone: it waits for no device.

    vision: FLOPs of an image's forward pass.  parameters: how many, by component.  passes: by component, 3 where it is
    trained, as the backward pass costs two forward passes, else 1.
    """

    vision: int
    parameters: dict[str, int]
    passes: dict[str, int]

    @classmethod
    def of(cls, model: Pi05) -> Work:
        """Of a model without memory, see `Blueprint.blank`."""
        size, components, values = model.config.vision.image_size, parameters_of(model), values_of(model)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.backbone.vision(torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.long))
        return cls(
            vision=counter.get_total_flops(),
            parameters={name: sum(values[p] for p in found) for name, found in components.items()},
            passes={name: 3 if any(p.requires_grad for p in found) else 1 for name, found in components.items()},
        )

    def cost(self, batch: Batch, module: Pi05Module) -> float:
        """Two per parameter and position that it computes, and those of attention."""
        language, (rows, slots), length = module.config.language, batch.image_mask.shape, batch.tokens.shape[1]
        prefix = slots * module.model.backbone.vision.num_tokens + length
        draws, steps = batch.actions.shape[0] * module.flow_draws, batch.actions.shape[1]
        per_pair = 4 * language.depth * language.num_heads * language.head_dim  # of a query and a key
        forward = {
            "vision": self.vision * len(batch.pixels),
            "language model": rows * prefix * (2 * self.parameters["language model"] + per_pair * prefix),
            "logits": 2 * self.parameters["logits"] * sum(map(len, batch.target_index.values())),
            "action expert": draws * steps * (2 * self.parameters["action expert"] + per_pair * (prefix + steps)),
        }
        return sum(flops * self.passes[name] for name, flops in forward.items())


class Throughput(Callback):
    """Logs `throughput/*` and `memory/*` at the trainer's logging interval, for all ranks, time between steps included.

    tokens_per_second counts valid image and text tokens and the action steps of every draw. hardware_share is FLOPs
    per second over the rate of a large matrix product, measured on this device in the types that are trained in. FLOPs
    are counted operation by operation for the first batch of each stage, on a model without memory: training's own
    operations are left alone. Those of other batches follow from their shapes, see `Work`. The share is not logged
    where FLOPs or the rate are unknown: with a head of your own that needs values, in FP8, and where other programs
    slowed the matrix product down so that training seems to be faster than it. Nothing waits for the device between two
    intervals. Time spent in validation and in rollouts does not count.
    """

    def __init__(self) -> None:
        self.count: Count | None = None
        self.stage: str | None = None
        self.work: Work | None = None
        self.flops_per_cost = 0.0
        self.peak_rate = 0.0
        self.dtypes = set[torch.dtype]()
        self.first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        self.stage, self.count, self.work = None, None, None
        self.first_step = trainer.global_step
        self.dtypes = training_dtypes(pl_module, trainer.precision)
        self.peak_rate = peak_rate(self.dtypes, pl_module.device) if self.dtypes else 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        assert isinstance(pl_module, Pi05Module)
        stage = pl_module.recipe.at(trainer.global_step)
        if stage.name != self.stage:
            model = pl_module.blueprint.blank(stage)
            self.stage, self.work = stage.name, Work.of(model)
            flops = count_flops(model, batch, stage, insulate=pl_module.knowledge_insulation)
            self.flops_per_cost = flops / self.work.cost(batch, pl_module)
            if trainer.global_step == self.first_step:
                self._forecast(trainer, pl_module, batch)
            self.count = None
        if self.count is None:
            self.count = Count(time.perf_counter(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Pi05Module)
        if self.count is None:  # paused by a callback before this one
            return
        self.count.samples += len(batch)
        self.count.tokens = self.count.tokens + count_tokens(batch, pl_module)
        assert self.work is not None
        self.count.cost += self.work.cost(batch, pl_module)
        stepped = trainer.global_step > self.count.first_step  # not so between accumulated batches
        if stepped and pl_module.logs_after(trainer.global_step):
            self._log(trainer, pl_module)

    def _forecast(self, trainer: Trainer, module: Pi05Module, batch: Batch) -> None:
        """Say before the first step how long the run will take: by what its first batch costs in every stage."""
        if not self.flops_per_cost or not self.peak_rate:
            return
        stages = module.recipe.between(trainer.global_step, trainer.max_steps)
        cost = sum(steps * Work.of(module.blueprint.blank(stage)).cost(batch, module) for stage, steps in stages)
        seconds = self.flops_per_cost * cost * trainer.accumulate_grad_batches / self.peak_rate
        rank_zero_info(
            f"Time: {duration(seconds)} at the best rate of this device ({self.peak_rate / 1e12:.2g} TFLOP/s); as a"
            f" rule {duration(seconds / USUAL_SHARES[1])} to {duration(seconds / USUAL_SHARES[0])}, without validation"
        )

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.count is not None
        tokens = float(self.count.tokens)  # waits for the device
        seconds = time.perf_counter() - self.count.start
        world = trainer.world_size
        values = {
            "throughput/samples_per_second": world * self.count.samples / seconds,
            "throughput/tokens_per_second": world * tokens / seconds,
            "throughput/seconds_per_step": seconds / (trainer.global_step - self.count.first_step),
            **memory(pl_module.device),
        }
        rate = self.flops_per_cost * self.count.cost / seconds
        if rate and self.peak_rate:
            values["throughput/tflops_per_second"] = world * rate / 1e12
            if rate > self.peak_rate and pl_module.device.type == "cpu":  # it was measured while something else ran
                self.peak_rate = max(self.peak_rate, peak_rate(self.dtypes, pl_module.device))
            if rate <= self.peak_rate:
                values["throughput/hardware_share"] = rate / self.peak_rate
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step - 1)  # of the step that was trained, as Lightning counts
        self.count = Count(time.perf_counter(), trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def pause(self) -> None:
        """Count anew from the next batch on: what is done until then is no training."""
        self.count = None


def duration(seconds: float) -> str:
    """In the largest unit of which there are two or more."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.3g} s"


def count_flops(model: Pi05, batch: Batch, stage: Stage, insulate: bool) -> int:
    """FLOPs of a batch's training step on a model without memory, see `Blueprint.blank`; 0 where they are unknown."""
    try:
        with FlopCounterMode(display=False) as counter:
            training_loss(model, batch.to("meta"), insulate, stage.weights).backward()
    except Exception as error:  # a head looks at values, of which there are none: in whatever way, training goes on
        log.debug("FLOPs of stage %s: %s", stage.name, error)
        return 0
    return counter.get_total_flops()


def count_tokens(batch: Batch, module: Pi05Module) -> Tensor:
    """Valid image and text tokens, and action steps of every noise draw; a scalar on the batch's device."""
    per_image = module.model.backbone.vision.num_tokens
    steps = batch.action_mask.any(-1).sum() * module.flow_draws
    return batch.token_mask.sum() + batch.image_mask.sum() * per_image + steps


def training_dtypes(module: LightningModule, precision: str) -> set[torch.dtype]:
    """What matrix products are computed in; nothing for FP8, which no product here is measured in."""
    own = {next(module.parameters()).dtype}
    if precision.startswith("transformer-engine"):
        return set()
    if "bf16" in precision:
        return own | {torch.bfloat16}
    return own | {torch.float16} if precision.startswith("16") else own


def memory(device: torch.device) -> dict[str, float]:
    """GB at the highest point so far: of the process, and on the GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = {"memory/process_peak_gb": peak / GB}
    if device.type == "cuda":
        used["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / GB
        used["memory/gpu_reserved_gb"] = torch.cuda.memory_reserved(device) / GB
    return used
