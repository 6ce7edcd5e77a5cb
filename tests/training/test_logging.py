"""What a run logs by itself, and that between two logging intervals nothing waits for the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from pi05_lightning.cli.run import default_callbacks
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.examples import ValidationExamples
from pi05_lightning.training.callbacks.mixture import BAD_SAMPLES, MixtureLog
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]


@pytest.fixture
def events(train: Train, tmp_path: Path) -> EventAccumulator:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    # shares hold in every batch, so that every term has targets in each
    mixed = {"length_window": 1}
    train(logger=logger, log_every_n_steps=1, accumulate_grad_batches=2, gradient_clip_val=1e-3, data_options=mixed)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    return accumulator


def test_with_an_interval_of_0_nothing_of_training_is_logged(train: Train, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    train(*default_callbacks(), logger=logger, log_every_n_steps=0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith(("loss", "mixture", "throughput"))]


def steps(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


def test_losses_rates_and_norms_are_logged_once_a_step_by_part_and_stage(events: EventAccumulator) -> None:
    pretrain, posttrain = list(range(PRETRAIN_STEPS)), list(range(PRETRAIN_STEPS, TOTAL))
    assert steps(events, "loss/total") == [*pretrain, *posttrain]
    assert steps(events, "loss/pretrain/text") == pretrain
    assert steps(events, "loss/posttrain/flow") == posttrain
    assert steps(events, "grad_norm/language") == [*pretrain, *posttrain]
    assert steps(events, "grad_norm/flow") == posttrain
    assert steps(events, "lr/decay_x1_x1") == [*pretrain, *posttrain]


def test_norms_are_those_before_clipping(events: EventAccumulator) -> None:
    assert min(event.value for event in events.Scalars("grad_norm/total")) > 1e-2


class WaitsForDevice(TorchDispatchMode):
    """Collects operations that bring a tensor's values to the host."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.watches = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [str(function) for name in self.names if self.watches and name in str(function)]
        return function(*args, **(kwargs or {}))


class BeginWatch(Callback):
    """Before all other callbacks: from here on a step has its batch, and collating the next one is not watched."""

    def __init__(self, mode: WaitsForDevice) -> None:
        self.mode, self.steps = mode, 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode.watches = True
        self.steps += 1


class EndWatch(Callback):
    """After all other callbacks."""

    def __init__(self, mode: WaitsForDevice) -> None:
        self.mode = mode

    def on_train_batch_end(self, *args: Any) -> None:
        self.mode.watches = False


def test_a_wait_would_be_noticed() -> None:
    with WaitsForDevice() as mode:
        float(torch.ones(1))
    assert mode.found


@pytest.mark.slow
def test_steps_bring_no_value_to_the_host(train: Train) -> None:
    """With all that a run of `pi05 fit` has around a step; logging intervals are longer than the run."""
    mode = WaitsForDevice()
    mode.watches = False
    begin = BeginWatch(mode)
    adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    module_options = {"optimizer": adamw, "lora": Lora(rank=2), "activation_checkpointing": True}
    callbacks = [begin, WeightAverage(0.9), *default_callbacks(), EndWatch(mode)]
    with mode:
        train(*callbacks, module_options=module_options, gradient_clip_val=1.0, log_every_n_steps=100)
    assert begin.steps == TOTAL
    assert mode.found == []


def test_validation_measures_chunks_as_the_module_is_told(train: Train) -> None:
    def measured(name: str, **module_options: Any) -> float:
        metrics = train(module_options=module_options, max_steps=1, limit_val_batches=1).callback_metrics
        (value,) = (float(value) for key, value in metrics.items() if key.endswith(f"/{name}"))
        return value

    assert measured("action_accuracy") < measured("action_accuracy", accuracy_threshold=9.0) == 1
    assert measured("action_mae", num_steps=1) != measured("action_mae", num_steps=3)


def test_bad_samples_of_steps_that_are_trained_again_are_listed_once(train: Train, tmp_path: Path) -> None:
    train(max_steps=2)
    file = tmp_path / BAD_SAMPLES
    file.write_text("".join(json.dumps({"step": step, "problem": "a frame"}) + "\n" for step in range(4)))
    train(MixtureLog(), max_steps=3, ckpt_path=tmp_path / "step=2.ckpt")
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1]


def test_a_validation_is_logged_at_the_steps_that_its_weights_have(train: Train, tmp_path: Path) -> None:
    train(logger=TensorBoardLogger(tmp_path, name="", version=""), limit_val_batches=1, val_check_interval=TOTAL)
    events = EventAccumulator(str(tmp_path)).Reload()
    measured = [tag for tag in events.Tags()["scalars"] if tag.startswith("val/")]
    assert measured
    assert {point.step for tag in measured for point in events.Scalars(tag)} == {TOTAL}


def test_a_validation_of_training_samples_no_worst_examples_which_nobody_would_see(train: Train) -> None:
    examples = ValidationExamples()
    train(examples, limit_val_batches=1, val_check_interval=TOTAL)
    assert all(examples.fixed.values())
    assert not any(examples.worse.values())
