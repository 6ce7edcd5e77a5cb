"""Nothing that watches a training run touches its numbers, or draws from the generators that others draw from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pi05_lightning.cli.run import default_callbacks
from pi05_lightning.training.callbacks.progress import ProgressLines

WATCHERS = {type(callback).__name__: type(callback) for callback in (*default_callbacks(), ProgressLines())}
VALIDATION = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}


class Bits(Callback):
    """Of every step: its loss, the weights after it, and all generators before it and after."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen.append(generators())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        weights = [parameter.detach().view(torch.int32).long().sum().item() for parameter in pl_module.parameters()]
        self.seen.append((outputs["loss"].item(), weights, generators()))


def generators() -> tuple[bytes, bytes, int]:
    numbers: Any = np.random.get_state()[1]  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), numbers.tobytes(), hash(random.getstate())


def bits(train: Callable[..., Trainer], *callbacks: Callback, **options: Any) -> list[Any]:
    watched = Bits()
    few = {"module_options": {"num_steps": 1}, "data_options": {"val_samples": 2}}
    bar = any(isinstance(callback, ProgressLines) for callback in callbacks)
    train(*callbacks, watched, enable_progress_bar=bar, **(few | options))
    assert len(watched.seen) == 12
    return watched.seen


@pytest.fixture
def unwatched(train: Callable[..., Trainer]) -> list[Any]:
    return bits(train)


@pytest.mark.slow_cases
@pytest.mark.parametrize("watcher", WATCHERS)
def test_callback_changes_no_bit_of_training(train: Any, unwatched: list[Any], watcher: str) -> None:
    assert bits(train, WATCHERS[watcher](), log_every_n_steps=1) == unwatched


@pytest.mark.slow
def test_all_of_them_with_loggers_validation_and_sanity_check_change_no_bit(
    train: Any, unwatched: list[Any], tmp_path: Path
) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    options = {"logger": loggers, "log_every_n_steps": 1, "num_sanity_val_steps": 2, "enable_model_summary": True}
    assert bits(train, *default_callbacks(), ProgressLines(0), **options, **VALIDATION) == unwatched


@pytest.mark.slow_cases
@pytest.mark.parametrize("interval", [0, 1, 2])
def test_how_often_numbers_are_logged_changes_no_bit(
    train: Any, unwatched: list[Any], tmp_path: Path, interval: int
) -> None:
    assert bits(train, logger=CSVLogger(tmp_path / "csv"), log_every_n_steps=interval) == unwatched
