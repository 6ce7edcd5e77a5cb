"""Data that changed since a checkpoint: refused when its run is resumed, measured with the checkpoint's statistics."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pi05_lightning.cli.main import main
from pi05_lightning.data.differences import differences
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import find_checkpoint
from tests.data.recorded import data_file, edit_info, rewrite
from tests.robot_run import STEPS, robot_source, trained_run

source = partial(robot_source, val_fraction=0.4)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its configuration and a dataset."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(pictures, folder / "data", ignore=shutil.ignore_patterns("pi05_*"))
    trained_run(folder, folder / "data", val_fraction=0.4)
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of it; the run's data are still at the first place until a flag names others."""
    return Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))


def at(data: Path) -> list[str]:
    return ["--data.sources.robot.init_args.path", str(data)]


def scale(root: Path, factor: float, feature: str = "action") -> None:
    """Multiply dim 1 of a feature, as a robot's other units would."""
    file = data_file(root)
    table = pq.read_table(file)
    values = np.stack(table[feature].to_numpy()) * np.array([1.0, factor, *[1.0] * 9][: len(table[feature][0])])
    column = pa.array(values.astype(np.float32).tolist(), table.schema.field(feature).type)
    pq.write_table(table.set_column(table.schema.get_field_index(feature), table.schema.field(feature), column), file)


def frame_numbers(root: Path) -> list[int]:
    return pq.read_table(data_file(root))["frame_index"].to_pylist()


def more(run: Path) -> list[str]:
    return ["fit", "--ckpt_path", str(run), "--stages.posttrain_steps", str(STEPS + 1)]


def flow_loss(run: Path, *flags: str) -> float:
    main(["validate", str(run), "--trainer.limit_val_batches", "1.0", *flags])
    return json.loads((run / "metrics.json").read_text())["robot/continuous_robot_actions"]["flow_loss"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("feature", ["action", "observation.state"])
def test_resuming_on_data_with_other_statistics_is_refused_with_source_dim_and_both_values(
    place: Path, feature: str
) -> None:
    scale(place / "data", 5, feature)
    with pytest.raises(
        SystemExit, match=r"data\.sources\.robot: 1 % and 99 % quantile of the (state|action): dim 1"
    ) as e:
        main([*more(place / "run"), *at(place / "data")])
    assert "init_from" in str(e.value)
    assert "dim 0" not in str(e.value)
    assert torch.load(find_checkpoint(place / "run"), weights_only=True)["global_step"] == STEPS


@pytest.mark.slow
def test_resuming_goes_on_where_the_same_data_moved_to(place: Path) -> None:
    main([*more(place / "run"), *at(place / "data")])
    assert torch.load(find_checkpoint(place / "run"), weights_only=True)["global_step"] == STEPS + 1


@pytest.mark.slow
def test_data_scaled_by_5_are_measured_with_the_checkpoints_statistics_and_it_is_said_once(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = flow_loss(place / "run", *at(place / "data"))
    assert "what the checkpoint has is used" not in caplog.text
    scale(place / "data", 5)
    after = flow_loss(place / "run", *at(place / "data"))
    assert after > 2 * before
    said = [r.getMessage() for r in caplog.records if "quantile of the action" in r.getMessage()]
    assert len(said) == 1
    assert "data.sources.robot" in said[0]
    assert "dim 1 0 and 53.1 (checkpoint 0 and 10.62)" in said[0]


@pytest.mark.slow_cases
@pytest.mark.parametrize("command", ["validate", "predict"])
def test_measuring_another_robot_is_refused(place: Path, command: str) -> None:
    flags = ["--trainer.limit_val_batches", "1.0"] if command == "validate" else []
    renamed = json.dumps({"other": source(place / "data")})
    with pytest.raises(SystemExit, match=r"data\.sources\.other: the checkpoint knows no such robot, only robot"):
        main([command, str(place / "run"), *flags, "--data.sources", renamed])
    edit_info(place / "data", fps=20)
    rewrite(data_file(place / "data"), timestamp=[n / 20 for n in frame_numbers(place / "data")])
    with pytest.raises(SystemExit, match=r"20 frames per second and the checkpoint was trained with 10"):
        main([command, str(place / "run"), *flags, *at(place / "data")])


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--data.language.condition_on", "task"],
            "data.language.condition_on: is 'task', and 'subtask' in the checkpoint",
        ),
        (["--data.language.prompts.subtask", "Do: {subtask}"], "data.language.prompts.subtask: is 'Do: {subtask}'"),
        (["--data.sources.robot.init_args.val_fraction", "0.9"], "data.sources.robot: 1 % and 99 % quantile"),
        (["--data.sources.robot.init_args.relative_dims", "[0]"], "data.sources.robot: relative is"),
        (["--data.sources", "{other: ROBOT}"], "data.sources.robot: is gone"),
    ],
)
def test_resuming_with_other_text_or_data_is_refused(place: Path, flags: list[str], named: str) -> None:
    flags = [flag.replace("ROBOT", json.dumps(source(place / "data"))) for flag in flags]
    with pytest.raises(SystemExit) as refused:
        main([*more(place / "run"), *flags])
    assert named in str(refused.value)


def test_annotations_that_are_added_go_on_and_are_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(data_file(place / "data"), subtask=["reach"] * len(frame_numbers(place / "data")))
    told = [*at(place / "data"), "--data.sources.robot.init_args.subtask_key", "subtask"]
    main([*more(place / "run"), *told])
    assert re.search(r"data\.sources: robot/hl_subtask: has \d+ samples, and had 0", caplog.text)
    assert "continuous_robot_actions: has" not in caplog.text


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_how_many_samples_there_were_goes_on(place: Path) -> None:
    path = find_checkpoint(place / "run")
    content = torch.load(path, weights_only=True)
    del content["pi05"]["sizes"]
    torch.save(content, path)
    main([*more(place / "run"), *at(place / "data")])
    assert torch.load(find_checkpoint(place / "run"), weights_only=True)["global_step"] == STEPS + 1


@pytest.mark.slow
def test_a_source_that_is_added_goes_on_and_is_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = {"robot": source(place / "data"), "second": source(place / "data")}
    main([*more(place / "run"), "--data.sources", json.dumps(both)])
    assert "data.sources.second: is a robot that the checkpoint does not know" in caplog.text
    assert set(locate(place / "run").processor().robots) == {"robot", "second"}


def test_limits_and_shares_of_the_data_are_the_flags(place: Path) -> None:
    main([*more(place / "run"), *at(place / "data"), "--data.language.max_tokens", "99", "--data.batch_size", "2"])
    assert locate(place / "run").processor().language.max_tokens == 99


@pytest.mark.slow
def test_other_text_in_validation_is_the_checkpoints_and_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = flow_loss(place / "run")
    assert flow_loss(place / "run", "--data.language.prompts.action", "Do {task}: {state}") == plain
    assert "data.language.prompts.action: is 'Do {task}: {state}'" in caplog.text


def test_rounding_is_no_difference_and_an_older_checkpoints_gaps_are_none(trained: Path) -> None:
    processor = locate(trained / "run").processor()
    saved = processor.to_dict()
    robot = saved["robots"]["robot"]
    q99 = robot["quantiles"]["action"]["q99"]
    q99[0] = float(np.nextafter(np.float32(q99[0]), np.float32(1e9)))
    robot["cameras"] = None
    for key in ("state_range", "has_subtasks", "embodiment"):
        del robot[key]
    assert differences(saved, processor) == []
    q99[0] *= 1.001
    assert [d.place for d in differences(saved, processor)] == ["data.sources.robot"]


def test_another_tokenizer_another_fast_tokenizer_and_other_cameras_are_differences(trained: Path) -> None:
    processor = locate(trained / "run").processor()
    saved = processor.to_dict()
    text = json.loads(saved["tokenizer"]["tokenizer"])
    first, second = list(text["model"]["vocab"])[300:302]
    vocabulary = text["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    changed = saved | {
        "tokenizer": {"tokenizer": json.dumps(text)},
        "fast": {"of": "other actions"},
        "cameras": ["wrist", *saved["cameras"]],
    }
    places = [d.place for d in differences(changed, processor) if not d.harmless]
    assert places == ["data.tokenizer", "data.fast", "data.cameras"]
