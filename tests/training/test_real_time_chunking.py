"""Training with given actions: what a step draws, and that validation draws nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning import Pi05Module
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Batch


class Times(Callback):
    """The flow times of every batch, by the phase that it was drawn for."""

    def __init__(self) -> None:
        self.training: list[torch.Tensor] = []
        self.validation: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        assert batch.time is not None
        self.training.append(batch.time)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Batch, index: int, loader: int = 0
    ) -> None:
        assert batch.time is not None
        self.validation.append(batch.time)


def test_training_draws_delays_and_validation_none(train: Callable[..., Trainer]) -> None:
    times = Times()
    train(times, module_options={"rtc_max_delay": 5}, limit_val_batches=1)
    given = torch.cat([(time == 0).sum(-1).flatten() for time in times.training if time.numel()])
    assert given.max() <= 5
    assert len(given.unique()) > 2
    assert times.validation
    assert all(time.ndim == 2 and (time > 0).all() for time in times.validation)


@pytest.mark.parametrize("delay", [-1, 8])
def test_a_delay_as_long_as_the_chunk_is_refused(delay: int) -> None:
    with pytest.raises(ValueError, match="rtc_max_delay"):
        Pi05Module(ModelConfig.preset("debug"), rtc_max_delay=delay)
