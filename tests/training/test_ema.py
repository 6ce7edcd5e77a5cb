"""The averaged weights: what they are, that a stop changes nothing, and who uses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.convert import convert
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.ema import WeightAverage
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS, STAGES

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]
NAME = "flow_head.action_in_proj.weight"
DECAY = 0.15
"""Above the warm-up's first value, 0.1, and below its second, 2 / 11."""


class Trace(Callback):
    """A parameter's value before training and after every optimizer step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(pl_module.model.get_parameter(NAME).detach().float().clone())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if len(self.values) == trainer.global_step:
            self.values.append(pl_module.model.get_parameter(NAME).detach().float().clone())


def load(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


def average_by_hand(values: list[Tensor]) -> Tensor:
    average = values[0]
    for step, value in enumerate(values[1:]):
        in_stage = step if step < PRETRAIN_STEPS else step - PRETRAIN_STEPS
        decay = min(DECAY, (1 + in_stage) / (10 + in_stage))
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}])
def test_average_is_updated_from_the_first_optimizer_step_with_warm_up(
    train: Train, tmp_path: Path, options: dict[str, Any]
) -> None:
    trace = Trace()
    train(trace, WeightAverage(DECAY), **options)
    assert len(trace.values) == TOTAL + 1
    torch.testing.assert_close(load(tmp_path, TOTAL)["ema"][NAME], average_by_hand(trace.values))


def test_average_is_fp32_though_the_weights_are_bf16(train: Train, tmp_path: Path) -> None:
    train(WeightAverage(0.9), precision="bf16-true")
    checkpoint = load(tmp_path, TOTAL)
    assert {x.dtype for x in checkpoint["state_dict"].values()} == {torch.bfloat16}
    assert {x.dtype for x in checkpoint["ema"].values()} == {torch.float32}


@pytest.mark.slow_cases
@pytest.mark.parametrize("stop", [1, PRETRAIN_STEPS, PRETRAIN_STEPS + 1])
def test_average_of_a_resumed_run_is_that_of_one_that_was_not_stopped(train: Train, tmp_path: Path, stop: int) -> None:
    train(WeightAverage(0.9))
    expected = load(tmp_path, TOTAL)["ema"]
    (tmp_path / f"step={TOTAL}.ckpt").unlink()
    train(WeightAverage(0.9), ckpt_path=tmp_path / f"step={stop}.ckpt")
    found = load(tmp_path, TOTAL)["ema"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_parts_that_no_stage_trains_have_no_average(train: Train, tmp_path: Path) -> None:
    frozen = {
        "pretrain": StageOptions(STAGES["pretrain"].losses, STAGES["pretrain"].mixture, freeze=(r"backbone\.vision",)),
        "posttrain": StageOptions(LossWeights(flow=1), STAGES["posttrain"].mixture, freeze=(r"backbone\.",)),
    }
    train(WeightAverage(0.9), stages=frozen)
    names = {name.removeprefix("model.") for name in load(tmp_path, TOTAL)["state_dict"]}
    assert load(tmp_path, TOTAL)["ema"].keys() == {name for name in names if "backbone.vision" not in name}


class WeightsInValidation(Callback):
    def __init__(self) -> None:
        self.during: Tensor | None = None
        self.after: Tensor | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.during = pl_module.model.get_parameter(NAME).detach().clone()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after = pl_module.model.get_parameter(NAME).detach().clone()


@pytest.mark.parametrize("uses_average", [True, False])
def test_validation_uses_the_average_by_choice_and_training_goes_on_with_its_own(
    train: Train, tmp_path: Path, uses_average: bool
) -> None:
    watch = WeightsInValidation()
    train(
        WeightAverage(0.9, validate=uses_average),
        watch,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        val_check_interval=TOTAL,
        check_val_every_n_epoch=None,
    )
    own, average = (load(tmp_path, TOTAL)[key] for key in ("state_dict", "ema"))
    assert watch.during is not None
    assert watch.after is not None
    assert torch.equal(watch.during, average[NAME] if uses_average else own[f"model.{NAME}"])
    assert torch.equal(watch.after, own[f"model.{NAME}"])
    assert not torch.equal(average[NAME], own[f"model.{NAME}"])


class InterruptInValidation(Callback):
    def on_validation_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_checkpoint_of_an_interrupted_validation_holds_the_weights_as_trained(train: Train, tmp_path: Path) -> None:
    train(WeightAverage(0.9))
    expected = load(tmp_path, TOTAL)["state_dict"]
    (tmp_path / f"step={TOTAL}.ckpt").unlink()
    with pytest.raises(SystemExit):
        train(
            WeightAverage(0.9),
            InterruptInValidation(),
            limit_val_batches=1,
            num_sanity_val_steps=0,
            val_check_interval=TOTAL,
            check_val_every_n_epoch=None,
        )
    found = load(tmp_path, TOTAL)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("averaged", [True, False])
def test_policy_takes_the_average_by_default_and_the_weights_by_choice(
    train: Train, tmp_path: Path, averaged: bool
) -> None:
    train(WeightAverage(0.9))
    checkpoint = load(tmp_path, TOTAL)
    options = {} if averaged else {"averaged": False}
    policy = Pi05Policy(tmp_path / f"step={TOTAL}.ckpt", **options)
    expected = checkpoint["ema"][NAME] if averaged else checkpoint["state_dict"][f"model.{NAME}"]
    assert torch.equal(policy.model.get_parameter(NAME), expected)


@pytest.mark.parametrize("averaged", [True, False])
def test_export_has_the_average_by_default_and_the_weights_by_choice(
    train: Train, tmp_path: Path, averaged: bool
) -> None:
    train(WeightAverage(0.9))
    file, target = tmp_path / f"step={TOTAL}.ckpt", tmp_path / "exported"
    convert(source=file, target=target, **({} if averaged else {"averaged": False}))
    checkpoint = load(tmp_path, TOTAL)
    expected = checkpoint["ema"][NAME] if averaged else checkpoint["state_dict"][f"model.{NAME}"]
    assert torch.equal(Pi05Policy(target).model.get_parameter(NAME), expected)


def test_policy_of_a_run_without_average_has_the_weights(train: Train, tmp_path: Path) -> None:
    train()
    checkpoint = load(tmp_path, TOTAL)
    assert "ema" not in checkpoint
    policy = Pi05Policy(tmp_path / f"step={TOTAL}.ckpt")
    assert torch.equal(policy.model.get_parameter(NAME), checkpoint["state_dict"][f"model.{NAME}"])


def test_impossible_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema\.decay is 1"):
        WeightAverage(1.0)
