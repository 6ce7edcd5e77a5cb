"""One clock, the optimizer step: whatever Lightning's batches and epochs are, a step trains its stage on its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from pi05_lightning.types import Batch

from .conftest import POSTTRAIN_STEPS, PRETRAIN_STEPS

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]


class Watch(Callback):
    """Notes of every step the keys of its batches, and whether they have actions."""

    def __init__(self) -> None:
        self.batches: dict[int, list[list[int]]] = {}
        self.acts: dict[int, set[bool]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.batches.setdefault(trainer.global_step, []).append(batch.key.tolist())
        self.acts.setdefault(trainer.global_step, set()).add(len(batch.actions) > 0)

    @property
    def samples(self) -> dict[int, list[int]]:
        return {step: sorted(sum(batches, [])) for step, batches in self.batches.items()}


def check_stages(watch: Watch, first: int = 0) -> None:
    """Every step from `first` on is done once, on its own stage's data."""
    assert watch.acts == {step: {step >= PRETRAIN_STEPS} for step in range(first, TOTAL)}


@pytest.fixture
def one_batch(train: Train) -> Callable[[int], dict[int, list[int]]]:
    """The samples of each step of a run whose steps are one batch of so many samples."""

    def samples(size: int) -> dict[int, list[int]]:
        watch = Watch()
        train(watch, data_options={"batch_size": size})
        return watch.samples

    return samples


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (1, {"limit_train_batches": 2}),
        (1, {"limit_train_batches": 4, "reload_dataloaders_every_n_epochs": 1}),
        (2, {}),
        (2, {"limit_train_batches": 4, "data_options": {"num_workers": 1}}),
        (4, {"limit_train_batches": 4}),
    ],
    ids=str,
)
def test_accumulated_batches_of_any_epoch_hold_the_samples_of_one_batch_as_large(
    train: Train, one_batch: Callable[[int], dict[int, list[int]]], accumulate: int, options: dict[str, Any]
) -> None:
    watch = Watch()
    trainer = train(watch, accumulate_grad_batches=accumulate, **options)
    assert trainer.global_step == TOTAL
    check_stages(watch)
    assert {len(batches) for batches in watch.batches.values()} == {accumulate}
    assert watch.samples == one_batch(4 * accumulate)


def test_scheduler_of_the_accumulation_changes_how_many_batches_a_step_has_and_not_its_stage(train: Train) -> None:
    watch = Watch()
    trainer = train(watch, GradientAccumulationScheduler({0: 2, 1: 1, 2: 4}), limit_train_batches=4)
    assert trainer.global_step == TOTAL + 1 - 1
    check_stages(watch)
    assert [len(watch.batches[step]) for step in range(TOTAL)] == [2, 2, 1, 1, 1, 1]
