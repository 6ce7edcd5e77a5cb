"""A third stage is a few lines of YAML: its switches, its curves and its groups; killed and resumed in each stage."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import yaml
from killable_fit import KILL_AT_BATCH, digest, fit, lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from two_stages import ACCUMULATE, POSTTRAIN_STEPS, PRETRAIN_STEPS

EXPERIENCE_STEPS = 3
SECOND, THIRD = PRETRAIN_STEPS, PRETRAIN_STEPS + POSTTRAIN_STEPS  # their first steps
STEPS = THIRD + EXPERIENCE_STEPS
KILLS = {2: "in the first stage", ACCUMULATE * SECOND + 3: "in the second", ACCUMULATE * THIRD + 1: "in the third"}


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """What is added to a run of two stages: one whose actions say their advantage."""
    sources = yaml.safe_load(config.read_text())["data"]["sources"]
    told = {**sources["robot"]["init_args"], "labels": "positive", "same_robot_as": "robot"}
    sources["told"] = sources["robot"] | {"init_args": told}
    stage = {
        "name": "experience",
        "steps": EXPERIENCE_STEPS,
        "losses": {"flow": 1},
        "flow_alpha": 2.0,
        "mixture": {"told/continuous_robot_actions": 1.0},
        "freeze": [r"backbone\.vision"],
        "lr_factors": {"flow_head": 0.5},
    }
    file = tmp_path_factory.mktemp("third") / "experience.yaml"
    content = {"stages": {"then": [stage]}, "data": {"sources": sources}, "trainer": {"log_every_n_steps": 1}}
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, config: Path, third: Path) -> tuple[Path, Path]:
    """The same run, whole, and killed in each stage."""
    folder = tmp_path_factory.mktemp("three")
    log = folder / "log"

    def start(run: Path) -> list[str]:
        return ["-c", str(config), "-c", str(third), "--run", str(run), "--data.num_workers", "0"]

    assert fit(start(folder / "whole"), log) == [0], log.read_text()
    for number, batch in enumerate(KILLS):
        args = ["--ckpt_path", str(folder / "killed")] if number else start(folder / "killed")
        assert fit(args, log, **{KILL_AT_BATCH: batch}) == [-signal.SIGKILL], log.read_text()
    assert fit(["--ckpt_path", str(folder / "killed")], log) == [0], log.read_text()
    return folder / "whole", folder / "killed"


def test_run_killed_in_each_of_three_stages_ends_as_the_whole_one(runs: tuple[Path, Path]) -> None:
    whole, killed = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs)
    assert whole["global_step"] == STEPS
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ema"):
        assert digest(killed[part]) == digest(whole[part]), part
    batches, again = lines(runs[0], 0), lines(runs[1], 0)
    assert batches.keys() == again.keys() == set(range(ACCUMULATE * STEPS))
    assert all(line == batches[batch][0] for batch, attempts in again.items() for line in attempts)


def test_checkpoint_says_that_the_third_stage_was_told_the_advantage(runs: tuple[Path, Path]) -> None:
    for run in runs:
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["pi05"]
        assert saved["trained"]["terms"]["advantage"] == EXPERIENCE_STEPS
        assert saved["processor"]["robots"]["told"]["same_as"] == "robot"


def test_every_stage_begins_at_exactly_its_step(runs: tuple[Path, Path]) -> None:
    for run in runs:
        events = EventAccumulator(str(run))
        events.Reload()
        stage = {event.step: event.value for event in events.Scalars("stage")}
        assert stage == {step: float((step >= SECOND) + (step >= THIRD)) for step in range(STEPS)}


def test_third_stage_has_curves_charts_and_learning_rates_of_its_own(runs: tuple[Path, Path]) -> None:
    events = EventAccumulator(str(runs[0]), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/experience/flow")] == list(range(THIRD, STEPS))
    assert "loss/experience/subtask" not in events.Tags()["scalars"]
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart.title for chart in next(c for c in layout.category if c.title == "losses").chart]
    assert [title for title in charts if title.endswith("by term")] == [
        f"{name}, by term" for name in ("pretrain", "posttrain", "experience")
    ]
    groups = {tag.removeprefix("lr/") for tag in events.Tags()["scalars"] if tag.startswith("lr/")}
    assert groups == {f"{decay}_x1_x1_{third}" for decay in ("decay", "no_decay") for third in ("x0", "x0.5", "x1")}
    rates = {event.step: event.value for event in events.Scalars("lr/decay_x1_x1_x0.5")}
    whole = {event.step: event.value for event in events.Scalars("lr/decay_x1_x1_x1")}
    assert all(rates[step] == pytest.approx(whole[step] * (0.5 if step >= THIRD else 1.0)) for step in range(STEPS))
