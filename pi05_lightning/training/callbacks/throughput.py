"""How fast training runs: samples and tokens per second, the share of the hardware's rate, and memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.module import Pi05Module
from pi05_lightning.profiling.rate import matmul_rate
from pi05_lightning.types import Batch

GB = 2**30
MATMUL_SIZE = {"cpu": 768}  # smaller than `matmul_rate`'s own, which would take seconds of every start


@dataclass
class Count:
    """What was trained on since the last time it was logged."""

    start: float
    first_step: int
    samples: int = 0
    tokens: Tensor | float = 0.0


class Throughput(Callback):
    """Logs `throughput/*` and `memory/*` at the trainer's logging interval, for all ranks, time between steps included.

    tokens_per_second counts valid image and text tokens and the action steps of every draw. hardware_share is FLOPs,
    counted operation by operation in the first step of each stage, times the rate of steps, over the rate of a large
    matrix product measured on this device in the precision that is trained in. Nothing waits for the device between
    two intervals. Time spent in validation does not count.
    """

    def __init__(self) -> None:
        self.count: Count | None = None
        self.stage: str | None = None
        self.counter: FlopCounterMode | None = None
        self.flops_per_sample = 0.0
        self.matmul_rate = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stage, self.count = None, None
        device, dtype = pl_module.device, training_dtype(pl_module, trainer.precision)
        self.matmul_rate = matmul_rate(dtype, device, MATMUL_SIZE.get(device.type))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        assert isinstance(pl_module, Pi05Module)
        if self.count is None:
            self.count = Count(time.perf_counter(), trainer.global_step)
        stage = pl_module.recipe.at(trainer.global_step).name
        if stage != self.stage:
            self.stage = stage
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Pi05Module)
        assert self.count is not None
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.flops_per_sample = self.counter.get_total_flops() / len(batch)
            # counting slows the operations down: the clock starts after it
            self.counter, self.count = None, Count(time.perf_counter(), trainer.global_step)
            return
        self.count.samples += len(batch)
        self.count.tokens = self.count.tokens + count_tokens(batch, pl_module)
        stepped = trainer.global_step > self.count.first_step  # not so between accumulated batches
        if stepped and pl_module.logs_after(trainer.global_step):
            self._log(trainer, pl_module)

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
        if self.flops_per_sample:
            rate = self.flops_per_sample * self.count.samples / seconds
            values["throughput/tflops_per_second"] = world * rate / 1e12
            values["throughput/hardware_share"] = rate / self.matmul_rate
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step - 1)  # of the step that was trained, as Lightning counts
        self.count = Count(time.perf_counter(), trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.counter = None


def count_tokens(batch: Batch, module: Pi05Module) -> Tensor:
    """Valid image and text tokens, and action steps of every noise draw; a scalar on the batch's device."""
    per_image = module.model.backbone.vision.num_tokens
    steps = batch.action_mask.any(-1).sum() * module.flow_draws
    return batch.token_mask.sum() + batch.image_mask.sum() * per_image + steps


def training_dtype(module: LightningModule, precision: str) -> torch.dtype:
    """What matrix products are computed in."""
    if "bf16" in precision:
        return torch.bfloat16
    if precision.startswith(("16", "transformer-engine-float16")):
        return torch.float16
    return next(module.parameters()).dtype


def memory(device: torch.device) -> dict[str, float]:
    """GB at the highest point so far: of the process, and on the GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = {"memory/process_peak_gb": peak / GB}
    if device.type == "cuda":
        used["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / GB
        used["memory/gpu_reserved_gb"] = torch.cuda.memory_reserved(device) / GB
    return used
