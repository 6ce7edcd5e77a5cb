"""What a run would stumble over hours later is refused when its data are opened, with the key to change."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.samples import Samples
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.evaluation.fast import read_chunks
from pi05_lightning.types import Shapes
from tests.data.recorded import HORIZON, LENGTHS, data_file, edit_info, open_source, rewrite

TOKENIZER = TextTokenizer.load("tiny")
SHAPES = Shapes(32, HORIZON, 4, TOKENIZER.vocab_size, 64, 0)


def datamodule(root: Path, fast: Path | None = None, language: Language | None = None, **options) -> Pi05DataModule:
    config = LeRobotConfig(str(root), **{"val_fraction": 0, "cameras": {}, **options})
    return Pi05DataModule({"robot": config}, fast=fast, language=language or Language(), shapes=SHAPES)


# --- outliers


def break_sensor(root: Path, key: str = "observation.state", row: int = 14, value: float = 1e6) -> None:
    """One value of one frame, in a dimension that 1 % of the frames do not move the quantiles of."""
    table = pq.read_table(data_file(root))
    values = np.array(table[key].to_pylist(), dtype=np.float32)
    values[:, 0] = np.linspace(0, 1, len(values))
    values[row, 0] = value
    rewrite(data_file(root), **{key: values.tolist()})


@pytest.fixture
def long(pictures_copy: Path) -> Path:
    """The dataset with each frame written 40 times: enough that one value is not within the quantiles."""
    path, meta = data_file(pictures_copy), next((pictures_copy / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(path)
    table = table.take(np.repeat(np.arange(len(table)), 40))
    pq.write_table(table, path)
    frames = np.concatenate([np.arange(40 * length) for length in LENGTHS])
    rewrite(path, frame_index=frames.tolist(), timestamp=(frames / 10).tolist())
    rewrite(meta, length=[40 * length for length in LENGTHS])
    return pictures_copy


def test_an_outlier_is_refused_before_training(long: Path) -> None:
    break_sensor(long, row=500)
    with pytest.raises(
        BadSample,
        match=r"dataset 'robot', episode 1, frame 20, observation.state: dimension 0 of its state is 2\.\d+e\+06",
    ):
        _ = datamodule(long).processor


@pytest.mark.parametrize(
    "options", [{}, {"relative_dims": [1], "relative_state_dims": [1]}], ids=["absolute", "relative"]
)
def test_an_outlying_action_is_in_every_chunk_that_holds_it(
    long: Path, options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    break_sensor(long, key="action", row=500)
    with pytest.raises(BadSample, match=r"episode 1, frame 20, action: dimension 0 of its action is"):
        _ = datamodule(long, **options).processor
    data = datamodule(long, on_bad_sample="skip", **options)
    with caplog.at_level(logging.WARNING):
        robot = data.processor.robots["robot"]
    source = data.sources("train")["robot"]
    assert len(source) == 40 * sum(LENGTHS) - HORIZON
    assert source.rejects.frames == HORIZON
    assert f"Left out: {HORIZON} frames" in caplog.text
    assert all(np.abs(robot.to_model(source[index]).actions).max() < 1e3 for index in range(480, 520))
    again = pickle.loads(pickle.dumps(source))  # as a spawned worker has it
    assert len(again) == len(source)
    np.testing.assert_array_equal(again.episode, source.episode)


def test_statistics_are_over_what_is_left_without_outliers(long: Path) -> None:
    break_sensor(long, row=500, value=1e9)
    data = datamodule(long, on_bad_sample="skip")
    robot, source = data.processor.robots["robot"], data.sources("train")["robot"]
    states = np.array([source[index].state for index in range(len(source))], np.float64)
    assert len(source) == 40 * sum(LENGTHS) - 1
    np.testing.assert_allclose(robot.normalize.state.q99, np.quantile(states, 0.99, axis=0), rtol=1e-6)
    assert robot.state_range is not None
    assert np.max(robot.state_range) < 100


def test_validation_frames_are_checked_by_the_statistics_of_training(long: Path) -> None:
    edit_info(long, splits={"train": "0:4", "val": "4:5"})
    break_sensor(long, row=40 * sum(LENGTHS) - 5)
    data = datamodule(long)
    assert data.processor.robots["robot"].normalize.state.q99[0] < 2
    with pytest.raises(BadSample, match=r"episode 4, frame 435, observation.state: dimension 0 of its state"):
        data.sources("val")


def test_a_fast_tokenizer_is_fitted_on_what_is_trained_on(long: Path) -> None:
    break_sensor(long, key="action", row=500)
    config = LeRobotConfig(str(long), cameras={}, val_fraction=0)
    with pytest.raises(BadSample, match=r"episode 1, frame 20, action: dimension 0 of its action is"):
        read_chunks(config, None, HORIZON, 10**6)
    chunks = read_chunks(replace(config, on_bad_sample="skip"), None, HORIZON, 10**6)["train"].actions
    assert len(chunks) == 40 * sum(LENGTHS) - HORIZON
    assert np.abs(chunks).max() < 1e3


# --- shapes


def test_more_action_dims_than_the_model_has_are_refused_with_the_key(pictures: Path) -> None:
    keys = ["observation.state", "action"]
    with pytest.raises(
        ValueError, match=r"dataset 'robot': its action has 5 dims, .* 4: set model.config.action_dim to 5"
    ):
        datamodule(pictures, action_keys=keys).sources("train")


def test_a_horizon_that_the_model_does_not_have_is_refused_with_the_key(pictures: Path) -> None:
    for options in ({"horizon_steps": HORIZON + 1}, {"horizon_seconds": (HORIZON + 1) / 10}):
        with pytest.raises(ValueError, match=r"dataset 'robot': horizon_.*model.config.horizon"):
            open_source(pictures, **options)


@pytest.mark.parametrize(
    ("shape", "fits", "converted"),
    [([48, 64, 3], True, True), ([3, 48, 64], True, True), ([48, 64, 1], False, True), ([48, 64], False, False),
     ([48, 64, 4], False, True), ([48, 64, 6], False, False)],
    ids=str,
)  # fmt: skip
def test_cameras_that_are_not_rgb_are_refused(pictures_copy: Path, shape: list, fits: bool, converted: bool) -> None:
    features = open_source(pictures_copy).files.features
    features["observation.images.top"]["shape"] = shape
    edit_info(pictures_copy, features=features)
    for options, allowed in (({}, fits), ({"convert_images": True}, converted)):
        if allowed:
            assert open_source(pictures_copy, cameras=None, **options).camera_names == ["top"]
        else:
            with pytest.raises(ValueError, match=r"observation.images.top has images of shape .* not RGB: .*`cameras`"):
                open_source(pictures_copy, cameras=None, **options)


@pytest.mark.parametrize(
    ("horizon", "dims", "named"),
    [
        (
            HORIZON + 2,
            2,
            r"fitted on chunks of 10 steps, and the model's horizon \(.*\) is 8 \(data.sources.robot\): fit",
        ),
        (HORIZON, 3, r"fitted on actions of 3 dims, and the robot's have 2 \(data.sources.robot\): fit one"),
    ],
)
def test_a_fast_tokenizer_of_other_chunks_is_refused(
    pictures: Path, tmp_path: Path, horizon: int, dims: int, named: str
) -> None:
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, horizon, dims)).astype(np.float32)
    FastTokenizer.fit([chunks], vocab_size=64, scale=2).save(tmp_path / "fast")
    with pytest.raises(ValueError, match=named):
        _ = datamodule(pictures, fast=tmp_path / "fast").processor


# --- texts


def test_a_task_that_is_too_long_is_refused_before_training(pictures_copy: Path) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    tasks = pq.read_table(path)
    (name,) = tasks.schema.pandas_metadata["index_columns"]
    rewritten = ["word " * 2000, *tasks[name].to_pylist()[1:]]
    place = tasks.column_names.index(name)
    pq.write_table(tasks.set_column(place, name, [rewritten]).replace_schema_metadata(tasks.schema.metadata), path)
    source = open_source(pictures_copy, cameras=None)
    robot = source.robot()
    samples = Samples({"robot": source}, Processor(SHAPES, TOKENIZER, source.camera_names, {"robot": robot}))
    with pytest.raises(
        BadSample, match=r"episode \d, frame 0: its text is \d+ tokens long, .* data.language.max_tokens"
    ):
        _ = [samples[0, index, 0] for index in samples.longest(0)]


@pytest.mark.parametrize("task", ["", "  ", "\n"])
def test_a_blank_task_is_none(pictures_copy: Path, task: str) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    tasks = pq.read_table(path)
    (name,) = tasks.schema.pandas_metadata["index_columns"]
    rewritten = [task, *tasks[name].to_pylist()[1:]]
    place = tasks.column_names.index(name)
    pq.write_table(tasks.set_column(place, name, [rewritten]).replace_schema_metadata(tasks.schema.metadata), path)
    with pytest.raises(BadSample, match="episode 0, frame 0, task_index: it has no task sentence"):
        open_source(pictures_copy)
    with pytest.raises(ValueError, match=r"dataset 'robot': `task` is .*: say what is done"):
        open_source(pictures_copy, task=task)


def test_blank_templates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompts.action is '  ': write a template"):
        Prompts(action="  ")
    for key in ("caption_prompt", "box_prompt", "camera"):
        with pytest.raises(ValueError, match=f"{key} is ' ': write what is meant"):
            VisionTextConfig("web", **{key: " "})
