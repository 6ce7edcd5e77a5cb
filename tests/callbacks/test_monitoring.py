"""What a run leaves for TensorBoard and the report: a real one, of six steps through both stages."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import Recipe
from pi05_lightning.training.callbacks.dashboard import Dashboard, layout
from pi05_lightning.training.callbacks.examples import ValidationExamples
from pi05_lightning.training.callbacks.provenance import Provenance, commit
from pi05_lightning.training.callbacks.throughput import Throughput
from tests.both_stages import STAGES
from tests.quiet_trainer import quiet_trainer

SWITCH, STEPS = 3, 8


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    seed_everything(0)
    stages = StageSwitch(SWITCH, STEPS - SWITCH, **STAGES)
    data = Pi05DataModule(
        {"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}, batch_size=4, num_workers=0, val_samples=4
    )
    trainer = quiet_trainer(
        stages,
        *(Provenance(), Dashboard(), Throughput(), ValidationExamples(first=1, worst=1)),
        logger=TensorBoardLogger(folder, name="", version=""),
        default_root_dir=folder,
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
        val_check_interval=STEPS,
        num_sanity_val_steps=0,
    )
    module = Pi05Module(ModelConfig.preset("debug"), num_steps=2)
    module.run_config = "seed_everything: 7\n"
    trainer.fit(module, data)
    return folder


def test_first_examples_come_from_as_many_batches_as_they_take(videos: Path, tmp_path: Path) -> None:
    examples = ValidationExamples(first=2, worst=0)
    sources = {"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}
    data = Pi05DataModule(sources, batch_size=1, num_workers=0, val_samples=3)
    module = Pi05Module(ModelConfig.preset("debug"), num_steps=2)
    quiet_trainer(examples, limit_val_batches=1.0, default_root_dir=tmp_path).validate(module, data, verbose=False)
    shown = {name: len(found) for name, found in examples.fixed.items()}
    assert shown == {name: min(2, module.results[name]["samples"]) for name in map(str, data.evaluated_subsets)}
    assert 2 in shown.values()


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    found.Reload()
    return found


def test_every_chart_for_what_was_logged_finds_its_tags(events: EventAccumulator) -> None:
    tags = events.Tags()["scalars"]
    found = {
        topic
        for topic, charts in layout(Recipe.of()).items()
        if any(
            re.match(tag, name) for title, (_, of) in charts.items() if title != "stage" for tag in of for name in tags
        )
    }
    assert {"losses", "learning rates", "gradient norms", "speed", "memory"} <= found
    assert "validation: continuous_robot_actions" in found
    assert "validation: qa" in found


def test_layout_is_in_the_run(events: EventAccumulator) -> None:
    (event,) = events.Tensors("custom_scalars__config__")
    written = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in written.category] == list(layout(Recipe.of()))
    assert all(category.chart[0].title == "stage" for category in written.category)


def test_stage_boundary_is_a_step_and_no_slope(events: EventAccumulator) -> None:
    stage = [(event.step, event.value) for event in events.Scalars("stage")]
    steps = sorted([*range(STEPS), 0, SWITCH])  # each after it was trained, and where a stage begins
    assert stage == [(step, float(step >= SWITCH)) for step in steps]


def test_resolved_configuration_is_a_text(events: EventAccumulator) -> None:
    (event,) = events.Tensors("config/text_summary")
    assert b"seed_everything: 7" in event.tensor_proto.string_val[0]


@pytest.mark.parametrize("tag", ["robot/continuous_robot_actions/0", "robot/hl_subtask/0", "robot/qa/0"])
def test_figures_are_drawn_at_every_validation(events: EventAccumulator, tag: str) -> None:
    assert len(events.Images(tag)) == 2


def test_error_over_the_horizon_is_drawn(events: EventAccumulator) -> None:
    assert len(events.Images("robot/continuous_robot_actions/error_over_horizon")) == 2


def test_generated_texts_are_beside_the_true_ones(events: EventAccumulator) -> None:
    text = events.Tensors("robot/hl_subtask/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| prompt | predicted | true |" in text
    assert "Subtask: " in text


@pytest.mark.parametrize(
    "tag",
    [
        "throughput/samples_per_second",
        "throughput/tokens_per_second",
        "throughput/hardware_share",
        "memory/process_peak_gb",
    ],
)
def test_speed_and_memory_are_positive_numbers(events: EventAccumulator, tag: str) -> None:
    values = [event.value for event in events.Scalars(tag)]
    assert values
    assert all(math.isfinite(value) and value > 0 for value in values)


def test_training_is_slower_than_the_fastest_matrix_product(events: EventAccumulator) -> None:
    assert all(event.value < 1 for event in events.Scalars("throughput/hardware_share"))


def test_validation_metrics_are_logged_under_the_names_of_the_table(events: EventAccumulator) -> None:
    assert {
        "val/robot/continuous_robot_actions/action_mae",
        "val/robot/continuous_robot_actions/flow_loss",
        "val_detail/robot/continuous_robot_actions/action_mae/dim_00",
        "val_detail/robot/continuous_robot_actions/action_mae/step_00",
        "val/robot/hl_subtask/exact_match",
    } <= set(events.Tags()["scalars"])


def test_provenance_names_command_hardware_and_data(run: Path) -> None:
    written = json.loads((run / "provenance.json").read_text())
    assert written["samples"]["robot/continuous_robot_actions"]["train"] > 0
    assert written["samples"]["robot/continuous_robot_actions"]["val"] > 0
    assert "cpu" in written["hardware"]
    assert written["command"]


def test_folder_that_is_no_checkout_has_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
