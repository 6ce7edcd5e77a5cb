"""Both stages in one run: when the switch happens, what it changes, and that stopping anywhere changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pi05_lightning.recipe import LossWeights, StageOptions
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS, STAGES

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]


class Watch(Callback):
    """Notes what every step had for its terms and its weights."""

    def __init__(self) -> None:
        self.expert: list[Tensor] = []
        self.losses: list[float] = []
        self.has_actions: list[bool] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.expert.append(pl_module.model.flow_head.action_in_proj.weight.detach().clone())
        self.losses.append(float(outputs["loss"]))
        self.has_actions.append(len(batch.actions) > 0)


def test_expert_is_untouched_until_exactly_the_switch_step(train: Train) -> None:
    watch = Watch()
    train(watch)
    changed = [not torch.equal(a, b) for a, b in zip(watch.expert, watch.expert[1:], strict=False)]
    assert changed == [False] * (PRETRAIN_STEPS - 1) + [True] * POSTTRAIN_STEPS


def test_data_switches_with_the_stage_though_loaders_run_ahead(train: Train) -> None:
    watch = Watch()
    train(watch)
    assert watch.has_actions == [False] * PRETRAIN_STEPS + [True] * POSTTRAIN_STEPS


def test_training_stops_after_both_stages(train: Train) -> None:
    assert train().global_step == TOTAL


def test_run_that_shall_end_before_its_stages_do_says_so(train: Train) -> None:
    with pytest.warns(UserWarning, match=f"ends the run after 1 of its stages' {TOTAL} steps"):
        assert train(max_steps=1).global_step == 1


def test_switch_is_in_tensorboard_at_its_step(train: Train, tmp_path: Path) -> None:
    train(logger=TensorBoardLogger(tmp_path, name="", version=""), log_every_n_steps=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    by_step = {event.step: event.value for event in events.Scalars("stage")}
    assert by_step == {0: 0, 1: 0, PRETRAIN_STEPS: 1, PRETRAIN_STEPS + POSTTRAIN_STEPS - 1: 1}


@pytest.mark.slow_cases
@pytest.mark.parametrize("stop", [PRETRAIN_STEPS - 1, PRETRAIN_STEPS, PRETRAIN_STEPS + 1])
def test_run_resumed_around_the_switch_ends_with_the_same_weights(train: Train, tmp_path: Path, stop: int) -> None:
    whole = Watch()
    train(whole)
    expected = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"]
    (tmp_path / f"step={TOTAL}.ckpt").unlink()
    resumed = Watch()
    train(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt")
    found = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"]
    assert resumed.losses == whole.losses[stop:]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_frozen_parts_of_a_stage_keep_their_weights(train: Train, tmp_path: Path) -> None:
    frozen = StageOptions(LossWeights(subtask=1, flow=1), STAGES["posttrain"].mixture, freeze=("backbone",))
    train(stages=STAGES | {"posttrain": frozen})
    before, after = (
        torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in (PRETRAIN_STEPS, TOTAL)
    )
    kept = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert kept == {name for name in after if "backbone" in name}
