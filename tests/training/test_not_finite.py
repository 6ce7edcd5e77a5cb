"""Losses and gradients that are not finite: they never reach the weights, and what is saved can be gone on from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.module import default_optimizer
from pi05_lightning.module.finite import FiniteSteps, StepNotFinite
from pi05_lightning.module.step import StepLosses
from pi05_lightning.recipe import LossWeights, Stage
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.restart import PENDING, Restart
from pi05_lightning.types import Drawn
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS

Train = Callable[..., Trainer]
TOTAL, SICK = PRETRAIN_STEPS + POSTTRAIN_STEPS, 4


class Sick(Callback):
    """Makes the flow loss, or only its gradient, nan or inf in a batch."""

    def __init__(self, batch: int, value: float, gradient_only: bool = False) -> None:
        self.batch, self.value, self.gradient_only = batch, value, gradient_only

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def change(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if not trainer.training or trainer.fit_loop.total_batch_idx != self.batch:
                return output
            if self.gradient_only:
                output.register_hook(lambda gradient: gradient * self.value)
                return output
            return output * self.value

        pl_module.model.flow_head.action_out_proj.register_forward_hook(change)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def tensors(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    states = checkpoint["optimizer_states"][0]["state"]
    moments = {f"{number}/{key}": value for number, state in states.items() for key, value in state.items()}
    return checkpoint["state_dict"] | {f"ema/{k}": v for k, v in checkpoint.get("ema", {}).items()} | moments


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = tensors(saved(one)), tensors(saved(other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow_cases
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
def test_a_run_stops_before_the_step_and_its_last_checkpoint_goes_on_as_if_nothing_had_been(
    train: Train, tmp_path: Path, accumulate: int, gradient_only: bool
) -> None:
    (tmp_path / "whole").mkdir()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    own = partial(RunCheckpoint, filename="{step}", every_n_train_steps=100, save_last="link", save_on_exception=True)
    train(WeightAverage(0.9), own(tmp_path / "whole"), **options)
    sick = Sick(SICK * accumulate + accumulate - 1, float("nan"), gradient_only)
    what = "the gradient norm of" if gradient_only else "the loss flow is nan"
    with pytest.raises(StepNotFinite, match=rf"step {SICK} \(stage posttrain\): {what}") as error:
        train(WeightAverage(0.9), sick, own(tmp_path / "run"), **options)
    assert "Samples: dataset 'robot', episode" in str(error.value)
    last = tmp_path / "run" / "last.ckpt"
    assert saved(last)["global_step"] == SICK
    train(WeightAverage(0.9), own(tmp_path / "again"), ckpt_path=last, **options)
    assert_equal(tmp_path / "again" / f"step={TOTAL}.ckpt", tmp_path / "whole" / f"step={TOTAL}.ckpt")


@pytest.mark.slow_cases
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, default_optimizer, partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_step_that_is_skipped_leaves_weights_and_optimizer_as_they_were(
    train: Train, tmp_path: Path, precision: str, optimizer: Any
) -> None:
    options = {"optimizer": optimizer if optimizer is default_optimizer else partial(optimizer, lr=1e-3)}
    train(Sick(SICK, float("inf")), precision=precision, module_options=options | {"max_skipped_steps": 1})
    assert_equal(tmp_path / f"step={SICK}.ckpt", tmp_path / f"step={SICK + 1}.ckpt")
    changed = saved(tmp_path / f"step={TOTAL}.ckpt")
    assert all(bool(value.isfinite().all()) for value in tensors(changed).values())
    assert changed["pi05"]["skipped_steps"] == 1


def test_skipped_steps_are_counted_over_the_whole_run(train: Train, tmp_path: Path) -> None:
    train(Sick(SICK, float("nan")), max_steps=SICK + 1, module_options={"max_skipped_steps": 1})
    last = tmp_path / f"step={SICK + 1}.ckpt"
    with pytest.raises(StepNotFinite, match=f"step {SICK + 1} "):
        train(Sick(SICK + 1, float("nan")), ckpt_path=last, module_options={"max_skipped_steps": 1})


@pytest.mark.parametrize("rate", [1e6, 1e38])
def test_no_poisoned_weights_are_saved_whatever_the_learning_rate(train: Train, tmp_path: Path, rate: float) -> None:
    with pytest.raises(StepNotFinite, match="learning rate"):
        train(module_options={"optimizer": partial(torch.optim.SGD, lr=rate)})
    for path in tmp_path.glob("*.ckpt"):
        assert all(bool(value.isfinite().all()) for value in tensors(saved(path)).values()), path


def test_a_negative_number_of_steps_to_skip_is_refused(train: Train) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps"):
        train(module_options={"max_skipped_steps": -1})


@pytest.mark.parametrize("max_skipped", [0, 5])
def test_a_step_of_which_no_rank_has_anything_to_learn_is_refused(max_skipped: int) -> None:
    """One rank alone is told so before it, see test_accumulation."""
    model, stage = torch.nn.Linear(2, 1), Stage(LossWeights(text=1, subtask=1), name="pretrain", steps=4)
    optimizer, finite = torch.optim.AdamW(model.parameters()), FiniteSteps(max_skipped, lambda drawn: [])
    for elements in (3, 0):
        losses, loss = StepLosses(), 0 * model(torch.ones(2)).sum()
        loss.backward()
        counts = {"text": torch.tensor(0), "subtask": torch.tensor(elements)}
        losses.saw(dict.fromkeys(counts, torch.zeros(())), counts, loss, Drawn({}, 0))
        with nullcontext() if elements else pytest.raises(ValueError, match="this step has nothing that the stage"):
            finite.before_step(0, stage, losses, model, optimizer)


@pytest.mark.slow
def test_ranks_stop_together_where_one_has_a_loss_that_is_not_finite(videos: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("sick_ranks.py")), str(videos), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode
    assert done.stderr.count("StepNotFinite: step 3 (stage posttrain): the loss flow is nan") == 2
    assert saved(tmp_path / "last.ckpt")["global_step"] == 3


def test_a_validation_that_was_over_is_not_due_again_where_the_first_step_after_it_stops(
    train: Train, tmp_path: Path
) -> None:
    each_second: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    train(Restart(), max_steps=SICK, **each_second)
    on_stop = RunCheckpoint(tmp_path / "stopped", "{step}", every_n_train_steps=100, save_on_exception=True)
    with pytest.raises(StepNotFinite):
        train(Restart(), Sick(SICK, torch.nan), on_stop, ckpt_path=tmp_path / f"step={SICK}.ckpt", **each_second)
    assert saved(tmp_path / "stopped" / f"step={SICK}.ckpt")[PENDING] is False
