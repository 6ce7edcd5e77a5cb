"""What the time of training steps was spent on: waiting for data, computing, communicating."""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.data.samples import TrainLoader
from pi05_lightning.files.cores import available_cores
from pi05_lightning.training.callbacks.interrupt import Stopped

MUCH = 0.1
"""Share of a step from which on there is advice."""
EARLY = 200
"""Batches after which advice is given the first time, if there is any."""


class StepTime(Callback):
    """Prints what shares of a batch's time were spent on, and advice where much was not computing.

    It does so when `fit` ends or is stopped, and early on where training waits for data. The times are of the first
    rank, by the host's clock, without the first batch, for which workers start and kernels are compiled. Communicating
    is what DDP does beside the backward pass; what is hidden behind it costs nothing, and what sharding gathers counts
    as computing. What callbacks after it do at a batch's end does not count; the command has rollouts there.
    """

    def __init__(self) -> None:
        self.batches = -1
        """That were counted; -1 before the first one, which is not."""
        self.computing = self.waiting = 0.0
        self._start = self._waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches, self.computing, self.waiting = -1, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._start = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.batches < 0:
            self._waited = waited(trainer)
        else:
            self.computing += perf_counter() - self._start
            self.waiting = waited(trainer) - self._waited
        self.batches += 1
        if self.batches == EARLY and self.waiting > MUCH * (self.waiting + self.computing):
            self._tell(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | Stopped):  # who stops a run may ask why it is slow
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        if self.batches < 1:
            return
        waiting, computing = self.waiting / self.batches, self.computing / self.batches
        model = trainer.strategy.model
        communicating = 0.0
        if isinstance(model, DistributedDataParallel):  # once for all accumulated batches
            communicating = min(communicated(model) / trainer.accumulate_grad_batches, computing)
        batch = waiting + computing
        parts = {"computing": computing - communicating, "waiting for data": waiting}
        if isinstance(model, DistributedDataParallel):
            parts["communicating"] = communicating
        told = ", ".join(f"{part / batch:.0%} {name}" for name, part in parts.items())
        rank_zero_info(f"Time of a batch: {batch:.3g} s, {told} ({self.batches} batches)")
        if waiting > MUCH * batch:
            rank_zero_info("Training waits for data. What helps: " + "; ".join(advice(trainer)))
        if communicating > MUCH * batch:
            rank_zero_info(
                "Ranks wait for each other's gradients. What helps: larger batches (data.batch_size), or fewer steps of"
                " several (trainer.accumulate_grad_batches)"
            )


def waited(trainer: Trainer) -> float:
    """Seconds that the run has waited for its batches so far."""
    loader = trainer.train_dataloader
    return loader.waited if isinstance(loader, TrainLoader) else 0.0


def communicated(model: DistributedDataParallel) -> float:
    """Seconds of a backward pass in which DDP communicates and computes nothing, as it samples them itself."""
    times = model._get_ddp_logging_data()  # in ns; nothing public tells it
    return 1e-9 * max(
        0, times.get("avg_backward_comm_time", 0) - times.get("avg_backward_compute_comm_overlap_time", 0)
    )


def advice(trainer: Trainer) -> Iterator[str]:
    """What makes batches come faster, of what is not done yet."""
    data = datamodule_of(trainer)
    share = (os.cpu_count() or 1) // trainer.num_devices
    cores = min(available_cores(), max(1, share))  # a rank's, whether or not it is bound to them
    if data.num_workers < cores:
        each = " for each rank" if trainer.num_devices > 1 else ""
        workers = min(cores, 2 * data.num_workers or 2)
        yield f"more workers (--data.num_workers {workers}; there are {cores} cores{each})"
    uncached = [name for name, config in data.configs.items() if getattr(config, "image_cache", True) is False]
    if uncached:
        flags = ", ".join(f"--data.sources.{name}.image_cache true" for name in uncached)
        yield f"images that are decoded once ({flags})"
    if len(data.processor.cameras) > 1:
        yield f"fewer than {len(data.processor.cameras)} cameras (`cameras` of the sources)"
    yield "smaller images in the datasets, or a faster disk"
