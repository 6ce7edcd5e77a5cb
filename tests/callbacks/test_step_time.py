"""What is said of a run's time: before its first step how long it will take, at its end what the time was spent on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks import step_time, throughput
from pi05_lightning.training.callbacks.interrupt import Stopped
from pi05_lightning.training.callbacks.step_time import StepTime
from pi05_lightning.training.callbacks.throughput import Throughput, duration
from tests.quiet_trainer import quiet_trainer

MIXTURE = {"robot/continuous_robot_actions": 1.0}


class Interrupts(Callback):
    """As Ctrl-C does, after three batches."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise Stopped(2, requeued=False)


def said(
    videos: Path, caplog: pytest.LogCaptureFixture, *callbacks: Callback, max_steps: int = -1, **source: Any
) -> str:
    """What a run of six steps says; its data are decoded while it waits."""
    seed_everything(0)
    stages = StageSwitch(0, 6, posttrain=StageOptions(LossWeights(subtask=1, flow=1), MIXTURE))
    robot = LeRobotConfig(path=str(videos), val_fraction=0.2, **source)
    trainer = quiet_trainer(stages, Throughput(), StepTime(), *callbacks, max_steps=max_steps)
    with caplog.at_level(logging.INFO):
        data = Pi05DataModule({"robot": robot}, batch_size=8, num_workers=0)
        trainer.fit(Pi05Module(ModelConfig.preset("debug")), data)
    return caplog.text


def test_time_is_told_before_and_after_with_what_would_help(
    videos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "MUCH", 0.0)  # how much it is depends on the machine
    text = said(videos, caplog)
    assert re.search(r"Time: [\d.e-]+ s at the best rate of this device \([\d.e-]+ TFLOP/s\)", text)
    shares = re.search(r"Time of a batch: [\d.]+ s, (\d+)% computing, (\d+)% waiting for data \(5 batches\)", text)
    assert shares is not None
    assert 99 <= sum(map(int, shares.groups())) <= 101
    assert text.index("Time: ") < text.index("Time of a batch: ")
    for advice in ("--data.num_workers 2", "--data.sources.robot.image_cache true", "fewer than 2 cameras"):
        assert advice in text


def test_steps_beyond_the_stages_are_forecast_as_those_of_the_last_stage(
    videos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "peak_rate", lambda *_: 1e12)
    for steps in (6, 12):
        with pytest.raises(Stopped):
            said(videos, caplog, Interrupts(), max_steps=steps)
    six, twelve = map(float, re.findall(r"Time: ([\d.e-]+) s at", caplog.text))
    assert twelve == pytest.approx(2 * six, rel=0.01)


def test_waiting_for_data_is_told_while_there_is_time_to_mend_it(
    videos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "MUCH", 0.0)
    monkeypatch.setattr(step_time, "EARLY", 3)
    assert re.findall(r"waiting for data \((\d) batches\)", said(videos, caplog)) == ["3", "5"]


@pytest.mark.parametrize(
    ("own", "ranks", "workers", "said"),
    [
        (8, 1, 2, "num_workers 4; there are 8 cores)"),
        (8, 4, 1, "num_workers 2; there are 2 cores for each rank)"),
        (2, 4, 1, "num_workers 2; there are 2 cores for each rank)"),  # as SLURM binds each rank to its own
        (8, 4, 2, ""),
    ],
)
def test_ranks_share_the_cores_that_there_may_be_workers_on(
    own: int, ranks: int, workers: int, said: str, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "available_cores", lambda: own)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    sources = {"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}
    data = Pi05DataModule(sources, num_workers=workers, shapes=ModelConfig.preset("debug").shapes)
    trainer = SimpleNamespace(num_devices=ranks, datamodule=data)
    told = [line for line in step_time.advice(cast("Trainer", trainer)) if "workers" in line]
    assert told == ([f"more workers (--data.{said}"] if said else [])


def test_time_of_a_run_that_is_stopped_is_told_too(videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Stopped):
        said(videos, caplog, Interrupts())
    assert re.search(r"Time of a batch: .* waiting for data \(2 batches\)", caplog.text)


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.14159, "3.14 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (200000, "2.3 days")]
)
def test_durations_are_in_units_that_say_something(seconds: float, words: str) -> None:
    assert duration(seconds) == words
