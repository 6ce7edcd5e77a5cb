"""What a robot's numbers become on their way to the model, and back: relative actions, ranges, names in prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.errors import BadFrame, BadSample
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.sources.lerobot import LeRobotSource
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.types import Modality, Shapes, Subset

from .test_lerobot_source import HORIZON, LENGTHS, data_file, open_source, rewrite

TOKENIZER = TextTokenizer.load("tiny")
SHAPES = Shapes(32, HORIZON, 4, TOKENIZER.vocab_size, 32, 0)
RELATIVE = {
    "state_keys": ["observation.gripper", "observation.state"],
    "action_keys": ["action", "observation.state"],  # five dims; the last three are a state, as an action may well be
    "relative_dims": [1, 4],
    "relative_state_dims": [2, 0],
}


def processor(source: LeRobotSource, language: Language | None = None) -> Processor:
    robot = source.robot()
    assert robot is not None
    return Processor(SHAPES, TOKENIZER, source.camera_names, {"robot": robot}, language)


def column(root: Path, *keys: str) -> np.ndarray:
    table = pq.read_table(data_file(root))
    return np.concatenate([np.array(table[key].to_pylist()).reshape(len(table), -1) for key in keys], axis=1)


def test_relative_dims_are_offsets_from_the_state_at_the_chunks_first_frame(videos: Path) -> None:
    source = open_source(videos, **RELATIVE)
    robot = source.robot()
    assert robot is not None
    assert robot.relative is not None
    moved = robot.relative(source[13]).actions
    states, actions = column(videos, *RELATIVE["state_keys"]), column(videos, *RELATIVE["action_keys"])
    steps = np.arange(13, 13 + HORIZON).clip(max=20)  # episode 1 ends at row 20
    expected = actions[steps]
    expected[:, 1] -= states[13, 2]
    expected[:, 4] -= states[13, 0]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_statistics_are_of_the_actions_as_trained(videos: Path) -> None:
    source = open_source(videos, **RELATIVE)
    robot = source.robot()
    assert robot is not None
    assert robot.relative is not None
    frames = [source[index] for index in range(len(source))]
    trained = np.concatenate([robot.relative(frame).actions[~frame.action_is_pad] for frame in frames])
    for dim in RELATIVE["relative_dims"]:
        expected = np.quantile(trained[:, dim].astype(np.float64), (0.01, 0.99))
        found = robot.normalize.action.q01[dim], robot.normalize.action.q99[dim]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(robot.normalize.action.q99[0], np.quantile(column(videos, "action")[:, 0], 0.99))


def test_a_predicted_chunk_comes_back_in_the_robots_absolute_units(videos: Path) -> None:
    source = open_source(videos, **RELATIVE)
    made, frame = processor(source), source[3]
    back = made.real_actions(made.normalize(frame, "robot").actions, frame, "robot")
    np.testing.assert_allclose(back, frame.actions, atol=1e-5)


def test_relative_actions_survive_the_checkpoint(videos: Path) -> None:
    source = open_source(videos, **RELATIVE, embodiment="so101", control_mode="joints")
    made, frame = processor(source), source[3]
    again = Processor.from_dict(made.to_dict())
    assert again.robots["robot"].relative == made.robots["robot"].relative
    assert again.robots["robot"].control_mode == "joints"
    chunk = np.zeros((HORIZON, 5), dtype=np.float32)
    np.testing.assert_array_equal(again.real_actions(chunk, frame, "robot"), made.real_actions(chunk, frame, "robot"))


@pytest.mark.parametrize(
    "options",
    [
        {"relative_dims": [2]},
        {"relative_dims": [0], "relative_state_dims": [3]},
        {"relative_dims": [0, 1], "relative_state_dims": [0]},
        {"relative_dims": [0], "state_keys": []},
    ],
)
def test_relative_dims_that_do_not_exist_are_named(videos: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=r"relative_dims \[.*dims of an action of 2"):
        open_source(videos, **options)


def test_a_chunk_may_be_given_in_steps(videos: Path) -> None:
    assert open_source(videos, horizon_steps=3)[0].action_is_pad.tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon_steps": 9}, "horizon_steps 9 is not from 1 to the model's horizon, 8"),
        ({"horizon_steps": 2, "horizon_seconds": 0.2}, "not both"),
        ({"horizon_seconds": 0.25}, "0.25 is 2.5 frames at 10 fps"),
    ],
)
def test_a_chunk_that_the_model_or_the_rate_cannot_hold_is_refused(videos: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(videos, **options)


def test_prompts_name_embodiment_and_control_mode(videos: Path) -> None:
    source = open_source(videos, embodiment="so101", control_mode="joints")
    prompts = Prompts(action="{embodiment}, {control_mode}: {task};\nAction: ")
    made = processor(source, Language(prompts=prompts, condition_on="task"))
    sample = made.sample(source[0], Subset("robot", Modality.CONTINUOUS))
    assert TOKENIZER.decode(sample.tokens) == "so101, joints: close the drawer;\nAction: "
    asked = made.prompt(source[0], "robot")
    np.testing.assert_array_equal(asked.tokens, sample.tokens)


def test_a_template_that_asks_for_the_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompts.task is 'Robot \{robot\}', and \['robot'\] is none of"):
        Prompts(task="Robot {robot}")


# --- ranges


def constant_gripper(root: Path, **odd: float) -> None:
    """The gripper's opening is 0.5 in all frames but those of `odd`, by row."""
    values = [0.5] * len(pq.read_table(data_file(root)))
    for row, value in odd.items():
        values[int(row.removeprefix("row"))] = value
    rewrite(data_file(root), **{"observation.gripper": np.array(values, np.float32)})


GRIPPER = {"state_keys": ["observation.state", "observation.gripper"]}


def test_a_dimension_without_range_is_an_error_that_says_where(videos_copy: Path) -> None:
    constant_gripper(videos_copy)
    with pytest.raises(
        BadSample,
        match=r"dataset 'robot', episode 0, frame 0, observation.state \+ observation.gripper: dimensions \[3\] have no"
        r" range: both quantiles are \[0.5\]. Set `min_range`",
    ):
        open_source(videos_copy, **GRIPPER).robot()


def test_the_frame_at_which_a_dimension_without_range_does_change_is_named(tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {key: {"dtype": "float32", "shape": (2,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("pi05/rare", 10, features, root=tmp_path / "rare", use_videos=False)
    for frame in range(150):
        numbers = np.array([frame, float(frame == 40)], np.float32)
        dataset.add_frame({"observation.state": numbers, "action": numbers[::-1].copy(), "task": "wait"})
    dataset.save_episode()
    dataset.finalize()
    with pytest.raises(
        BadSample,
        match=r"(?s)episode 0, frame 40, observation.state: dimensions \[1\] have no range.*"
        r"\[0.0\] to \[1.0\], which is rare: a `min_range` of 1 takes",
    ):
        open_source(tmp_path / "rare").robot()
    normal = open_source(tmp_path / "rare", min_range=1).robot().normalize.state
    assert abs(normal.normalize(np.array([0, 1.0]))[1]) <= 2


def test_a_dimension_that_rarely_changes_is_an_error_also_where_bad_samples_are_skipped(tmp_path: Path) -> None:
    """Else all chunks in which the gripper closes were left out."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {key: {"dtype": "float32", "shape": (2,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("pi05/rare", 10, features, root=tmp_path / "rare", use_videos=False)
    for frame in range(150):
        state, action = np.array([frame, frame], np.float32), np.array([frame, float(frame == 40)], np.float32)
        dataset.add_frame({"observation.state": state, "action": action, "task": "wait"})
    dataset.save_episode()
    dataset.finalize()
    rare = r"episode 0, frame 40, action: dimensions \[1\] have no range.*a `min_range` of 1 .*skip does not mend it"
    with pytest.raises(BadSample, match=rare):
        open_source(tmp_path / "rare", on_bad_sample="skip").checked_robot()
    assert open_source(tmp_path / "rare", on_bad_sample="skip").robot() is not None  # as `pi05 check` looks at it
    source = open_source(tmp_path / "rare", on_bad_sample="skip", min_range=1)
    source.checked_robot()
    assert len(source) == 150


def test_no_frame_is_named_for_offsets_without_range(tmp_path: Path) -> None:
    """They are those of pairs of frames, and the frames' own actions say nothing of them."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {key: {"dtype": "float32", "shape": (2,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("pi05/rare", 10, features, root=tmp_path / "rare", use_videos=False)
    for frame in range(150):
        state = np.array([frame, frame], np.float32)
        action = np.array([-frame, frame + 2 + (frame == 40)], np.float32)
        dataset.add_frame({"observation.state": state, "action": action, "task": "wait"})
    dataset.save_episode()
    dataset.finalize()
    with pytest.raises(
        BadSample, match=r"dataset 'robot', action: dimensions \[1\] have no range: .* \[2.0\] to \[3.0\]"
    ):
        open_source(tmp_path / "rare", relative_dims=[1], horizon_steps=1).robot()


def test_a_dimension_that_never_changes_is_said_where_bad_samples_are_skipped(
    videos_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant_gripper(videos_copy)
    source = open_source(videos_copy, **GRIPPER, on_bad_sample="skip")
    assert source.checked_robot() is not None
    assert len(source) == sum(LENGTHS)
    assert "dimensions [3] have no range" in caplog.text


def test_min_range_gives_it_one(videos_copy: Path) -> None:
    constant_gripper(videos_copy)
    robot = open_source(videos_copy, **GRIPPER, min_range=0.2).robot()
    assert robot is not None
    np.testing.assert_allclose(robot.normalize.state.normalize(np.array([0, 0, 0, 0.6], np.float32))[3], 1.0, rtol=1e-5)


def test_a_value_that_no_statistics_explain_is_bad_data(videos_copy: Path) -> None:
    constant_gripper(videos_copy)
    source = open_source(videos_copy, **GRIPPER, on_bad_sample="skip")
    made = processor(source)
    source.columns.state[4, 3] = 0.9
    made.sample(source[3], Subset("robot", Modality.CONTINUOUS))
    with pytest.raises(BadFrame, match=r"dimension 3 of its state is 8e\+07 when normalised.*min_range"):
        made.sample(source[4], Subset("robot", Modality.CONTINUOUS))
