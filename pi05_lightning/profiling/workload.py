"""A model and the size of its steps, to be counted, tracked and timed."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import checkpoint_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.profiling.cost import (
    COMPONENTS,
    CostCounter,
    Meter,
    Stopwatch,
    measure_chunk,
    measure_training_step,
)
from pi05_lightning.profiling.step import StepShape, training_loss


@dataclass(frozen=True)
class Workload:
    """Training steps of a model and its action chunks, which `train` tells apart."""

    config: ModelConfig
    shape: StepShape
    num_steps: int = 10
    """Euler steps of a chunk."""
    insulate: bool = False
    """The flow loss gives the backbone no gradient."""
    checkpointing: bool = False
    """Keep only each block's input for the backward pass."""
    dtype: torch.dtype = torch.float32
    """What matrix products are computed in."""
    weights: torch.dtype = torch.float32
    """What a training step keeps weights, gradients and the optimizer's state in."""

    def __post_init__(self) -> None:
        check_range("num_steps", self.num_steps, 1)
        cameras, most = self.shape.cameras, self.config.shapes.max_cameras
        if most is not None and cameras > most:
            raise ValueError(f"cameras is {cameras}, and this model was made for {most} at most")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, device: torch.device | str) -> Pi05:
        model = Pi05.without_memory(self.config)
        if self.checkpointing:
            checkpoint_blocks(model)
        if torch.device(device).type != "meta":
            model.to_empty(device=device)
            model.reset_parameters()
        return model

    def autocast(self, device: torch.device | str) -> torch.autocast | nullcontext[None]:
        kind = torch.device(device).type
        casts = self.dtype != torch.float32 and kind != "meta"
        return torch.autocast(kind, self.dtype) if casts else nullcontext()

    def run(self, model: Pi05, device: torch.device | str, train: bool, meter: Meter) -> None:
        shape = self.shape if train else self.shape.for_chunk
        batch = shape.batch(self.config, device)
        with self.autocast(device):
            if train:
                measure_training_step(model, batch, self.insulate, meter)
            else:
                measure_chunk(model, batch, self.num_steps, meter)

    def count(self, train: bool) -> CostCounter:
        """FLOPs and bytes by component, without memory."""
        # autocast knows no meta tensors: everything in the compute's dtype is what its bytes come close to
        model, counter = self.model("meta").to(self.dtype), CostCounter()
        with counter:
            self.run(model, "meta", train, counter)
        return counter

    def loss(self, model: Pi05) -> Tensor:
        """A training step's, of a batch of random data."""
        return training_loss(model, self.shape.batch(self.config), self.insulate)

    def measure(self, train: bool, repeats: int = 3) -> dict[str, float]:
        """Seconds by component on this machine, the medians of a few runs after one to warm up."""
        model, stopwatches = self.model(self.device), []
        for _ in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            stopwatches.append(Stopwatch(self.device))
            self.run(model, self.device, train, stopwatches[-1])
        return {part: statistics.median(watch.seconds[part] for watch in stopwatches[1:]) for part in COMPONENTS}
