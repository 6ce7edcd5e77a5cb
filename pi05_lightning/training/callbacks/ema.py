"""An exponential moving average of the weights, kept in fp32 whatever the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import callbacks_of
from pi05_lightning.recipe import Recipe
from pi05_lightning.weights.sharded_checkpoint import AVERAGE, AVERAGED


class WeightAverage(Callback):
    """Averages every parameter that any stage trains, from the first step on; validation and policies use the average.

    After n steps of its stage, decay is min(decay, (1 + n) / (10 + n)): a short warm-up, by which a stage's average
    soon forgets what the stage began with, as it would the expert's random weights. It is a function of the step, and
    the average travels in the checkpoint, so a resumed run goes on exactly.

    Args:
        decay: share of the average that a step keeps, e.g. 0.999; null: there is no average.
        validate: validation, test and prediction use the average; otherwise the weights as they are trained.
    """

    def __init__(self, decay: float | None = None, validate: bool = True) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}: it must be in [0, 1), or null for no average")
        self.decay, self.validate = decay, validate
        self.average: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []
        self._own: dict[str, Tensor] = {}

    # --- training

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        resumed, self.average, self._pairs = self.average, {}, []
        pl_module.average = self.average
        if self.decay is None:
            return
        for name, parameter in pl_module.model.named_parameters():
            if pl_module.recipe.trains(name):
                start = resumed.get(name, parameter.detach())
                self.average[name] = start.to(parameter.device, torch.float32, copy=True)
                self._pairs.append((self.average[name], parameter))
        # with the weights: what other callbacks do at the step's end, or stop it by, finds both
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._update(trainer.global_step, pl_module.recipe))

    @torch.no_grad()
    def _update(self, step: int, recipe: Recipe) -> None:
        assert self.decay is not None
        done, _ = recipe.progress(step)
        weight = 1 - min(self.decay, (1 + done) / (10 + done))
        for average, parameter in self._pairs:
            average.lerp_(parameter.detach().float(), weight)

    # --- use

    @contextmanager
    def applied(self, pl_module: LightningModule) -> Iterator[None]:
        """The module computes with the average inside the context; with its own weights where there is none."""
        self._apply(pl_module)
        try:
            yield
        finally:
            self._restore(pl_module)

    def _apply(self, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        parameters = dict(pl_module.model.named_parameters())
        for name, average in self.average.items():
            if isinstance(average, DTensor):  # FSDP has views of its own of what it divided
                self._own[name] = parameters[name].detach().clone()
                parameters[name].detach().copy_(average)
            else:
                # exchanged, not copied: fp32 weights need no further memory
                self._own[name] = parameters[name].data
                parameters[name].data = average.to(self._own[name])

    def _restore(self, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        parameters = dict(pl_module.model.named_parameters())
        for name, own in self._own.items():
            if isinstance(own, DTensor):
                parameters[name].detach().copy_(own)
            else:
                parameters[name].data = own
        self._own = {}

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validate:
            self._apply(pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._restore(pl_module)

    on_validation_start = on_test_start = on_predict_start = _begin
    # an exception's before a checkpoint is written of it
    on_validation_end = on_test_end = on_predict_end = on_exception = _end

    # --- checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.average = checkpoint.get(AVERAGE, {})
        is_used = bool(self.average) or checkpoint.get(AVERAGED, False)
        if is_used and self.decay is None and self.validate and trainer.state.fn != "fit":
            rank_zero_info(
                "ema.decay is null, and the checkpoint's average is used: ema.validate false uses its weights"
            )


def validates_average(trainer: Trainer) -> bool:
    """Whether validation, test and prediction use a checkpoint's average where it has one."""
    return any(average.validate for average in callbacks_of(trainer, WeightAverage))
