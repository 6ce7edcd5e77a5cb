"""One clock, the optimizer step: whatever Lightning counts, each step trains its own stage on its own samples."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.types import Batch
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS

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
        return {step: sorted(chain(*batches)) for step, batches in self.batches.items()}


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


@pytest.mark.slow_cases
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
    assert trainer.global_step == TOTAL
    check_stages(watch)
    assert [len(watch.batches[step]) for step in range(TOTAL)] == [2, 2, 1, 1, 1, 1]


HOW: dict[str, dict[str, Any]] = {
    "one batch a step": {},
    "4 batches a step": {"accumulate_grad_batches": 4},
    "epochs of 2 batches": {"limit_train_batches": 2},
    "epochs of 8 batches, 4 a step": {"limit_train_batches": 8, "accumulate_grad_batches": 4},
    "2 batches a step, 4 from the second epoch on": {"limit_train_batches": 4, "schedule": {0: 2, 1: 4}},
}
BATCHES = [[1] * TOTAL, [4] * TOTAL, [1] * TOTAL, [4] * TOTAL, [2, 2, 4, 4, 4, 4]]
"""Of each step, in the order of HOW."""


def run(train: Train, watch: Watch, how: str, **options: Any) -> Trainer:
    given = HOW[how] | options
    schedule = given.pop("schedule", None)
    return train(watch, *([GradientAccumulationScheduler(dict(schedule))] if schedule else []), **given)


@pytest.mark.slow_cases
@pytest.mark.parametrize("stop", [2, PRETRAIN_STEPS, 4])
@pytest.mark.parametrize("before", HOW)
def test_run_resumed_with_another_accumulation_or_other_epochs_does_each_step_once_on_its_stage(
    train: Train, tmp_path: Path, before: str, stop: int
) -> None:
    run(train, Watch(), before, max_steps=stop)
    checkpoint = (tmp_path / f"step={stop}.ckpt").rename(tmp_path / "stopped.ckpt")
    for after, batches in zip(HOW, BATCHES, strict=True):
        watch = Watch()
        trainer = run(train, watch, after, ckpt_path=checkpoint)
        assert trainer.global_step == TOTAL, after
        check_stages(watch, stop)
        assert [len(watch.batches[step]) for step in range(stop, TOTAL)] == batches[stop:], after


@pytest.mark.slow_cases
@pytest.mark.parametrize("how", HOW)
def test_run_resumed_as_it_was_ends_with_the_same_weights_whatever_its_epochs(
    train: Train, tmp_path: Path, how: str
) -> None:
    whole = Watch()
    run(train, whole, how)
    expected = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"]
    for stop in (2, PRETRAIN_STEPS, 4):
        (tmp_path / f"step={TOTAL}.ckpt").unlink()
        resumed = Watch()
        run(train, resumed, how, ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert resumed.batches == {step: whole.batches[step] for step in range(stop, TOTAL)}
        found = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"limit_train_batches": 0.5}, r"trainer.limit_train_batches is 0.5, a share.*trainer.max_steps"),
        ({"overfit_batches": 2}, r"trainer.overfit_batches .*`episodes`"),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, "limit_train_batches: an epoch of 5 .* such as 6"),
        ({"fast_dev_run": 1, "accumulate_grad_batches": 4}, "fast_dev_run: an epoch of 1 .* such as 4"),
        ({"callbacks": [GradientAccumulationScheduler({2: 4})]}, "without trainer.limit_train_batches the run is one"),
        ({"max_epochs": 3}, "trainer.max_epochs is 3, .* without trainer.limit_train_batches the run is one epoch"),
        ({"min_epochs": 2}, r"trainer.min_epochs is 2, .*the stages' steps or trainer.max_steps"),
        ({"check_val_every_n_epoch": 2, "limit_val_batches": 1}, "the run has 1 epochs, so it would never validate"),
    ],
    ids=["share", "overfit", "limit", "fast_dev_run", "scheduler", "most", "least", "epochs"],
)
def test_options_that_end_an_epoch_within_a_step_or_draw_other_batches_are_refused(
    train: Train, options: dict[str, Any], named: str
) -> None:
    given = dict(options)
    with pytest.raises(ValueError, match=named):
        train(*given.pop("callbacks", []), **given)


@pytest.mark.parametrize("options", [{"max_epochs": None}, {"max_epochs": 1, "limit_train_batches": 2}], ids=str)
def test_epochs_that_nobody_counts_or_that_have_an_end_are_taken(train: Train, options: dict[str, Any]) -> None:
    assert train(**options).global_step == (TOTAL if options["max_epochs"] is None else 2)


class StopWithin(Callback):
    """Ends training as a timer does, after a batch whose gradients no optimizer step has used."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        trainer.should_stop = batch_idx == 6


@pytest.mark.slow
def test_run_that_a_timer_ends_within_a_step_is_saved_and_does_that_step_anew(train: Train, tmp_path: Path) -> None:
    whole = Watch()
    train(whole, accumulate_grad_batches=2)
    expected = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"]
    last = RunCheckpoint(tmp_path / "stopped", every_n_train_steps=100)
    assert train(StopWithin(), last, accumulate_grad_batches=2).global_step == 3
    resumed = Watch()
    train(resumed, accumulate_grad_batches=2, ckpt_path=next((tmp_path / "stopped").iterdir()))
    assert resumed.batches == {step: whole.batches[step] for step in range(3, TOTAL)}
    found = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
