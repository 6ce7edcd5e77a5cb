"""Validation in the midst of training: it leaves no trace in what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.training.callbacks.examples import ValidationExamples


class Losses(Callback):
    """Every step's loss, and what the global generators would draw after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.states: list[torch.Tensor] = []
        self.drawn: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.states.append(torch.get_rng_state())
        self.drawn.append(float(np.random.get_state()[1].sum()))  # type: ignore[union-attr, index] # noqa: NPY002

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def test_losses_are_bit_identical_with_and_without_validation(train: Callable[..., Trainer]) -> None:
    without, between = Losses(), Losses()
    train(without)
    trainer = train(between, ValidationExamples(), limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1)
    assert any(name.startswith("val/") for name in trainer.callback_metrics)
    assert between.losses == without.losses


def test_validation_draws_nothing_from_the_global_generators(train: Callable[..., Trainer]) -> None:
    without, between = Losses(), Losses()
    train(without)
    train(between, ValidationExamples(), limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1)
    assert all(torch.equal(a, b) for a, b in zip(between.states, without.states, strict=True))
    assert between.drawn == without.drawn
