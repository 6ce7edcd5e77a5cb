from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.types import Answer, Modality
from tests.data.recorded import HORIZON, LENGTHS, STARTS, data_file, edit_info, open_source, rewrite

# --- what a frame holds


def test_chunks_are_those_of_lerobot_dataset(videos: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    deltas = {"action": [step / 10 for step in range(HORIZON)]}
    reference = LeRobotDataset("robot", root=videos, delta_timestamps=deltas, video_backend="pyav")
    source = open_source(videos)
    assert len(source) == len(reference)
    for index in range(len(source)):
        theirs, ours = reference.reader.hf_dataset[index], source[index]
        query, pad = reference.reader._get_query_indices(index, int(theirs["episode_index"]))
        np.testing.assert_array_equal(ours.action_is_pad, pad["action_is_pad"].numpy())
        np.testing.assert_array_equal(ours.actions, reference.reader._query_hf_dataset(query)["action"].numpy())
        np.testing.assert_array_equal(ours.state, theirs["observation.state"].numpy())


def test_past_the_episodes_end_the_last_action_is_repeated_and_marked(videos: Path) -> None:
    frame = open_source(videos)[int(STARTS[1]) - 2]
    assert frame.action_is_pad is not None
    assert frame.action_is_pad.tolist() == [False] * 2 + [True] * 6
    np.testing.assert_array_equal(frame.actions, [[0, 10]] + [[0, 11]] * 7)


def test_task_is_the_episodes_sentence(videos: Path) -> None:
    source = open_source(videos)
    assert [source[int(start)].task for start in STARTS[:2]] == ["close the drawer", "open the drawer"]


def test_vectors_are_concatenated_in_the_configured_order(videos: Path) -> None:
    source = open_source(videos, state_keys=["observation.gripper", "observation.state"])
    table = pq.read_table(data_file(videos))
    expected = [table["observation.gripper"][20].as_py(), *table["observation.state"][20].as_py()]
    np.testing.assert_array_equal(source[20].state, np.array(expected, dtype=np.float32))


def test_data_without_actions_teaches_no_actions(videos: Path) -> None:
    source = open_source(videos, action_keys=[])
    assert source[0].actions is None
    assert len(source.indices(Modality.CONTINUOUS)) == 0


def test_data_without_actions_has_its_state_normalised(videos: Path) -> None:
    robot = open_source(videos, action_keys=[]).robot()
    assert robot is not None
    assert not robot.acts
    assert robot.state_dim == 3


def test_horizon_in_seconds_pads_the_rest_of_the_chunk(videos: Path) -> None:
    frame = open_source(videos, horizon_seconds=0.5)[0]
    assert frame.action_is_pad is not None
    assert frame.action_is_pad.tolist() == [False] * 5 + [True] * 3


def test_quantiles_are_numpys_on_the_training_split(videos: Path) -> None:
    source = open_source(videos, val_fraction=0.4)
    robot, table = source.robot(), pq.read_table(data_file(videos))
    trained = np.isin(table["episode_index"], source.episode)
    assert not trained.all()
    actions = np.array(table["action"].to_pylist())[trained]
    assert robot is not None
    np.testing.assert_allclose(robot.normalize.action.q99, np.quantile(actions, 0.99, axis=0), rtol=1e-6)


# --- language


def test_subtask_is_the_one_active_at_the_frame(videos: Path) -> None:
    source = open_source(videos)
    assert [source[i].subtask for i in (0, 1, 2, 6, 7, 11)] == [None, None, *["reach 0"] * 2, *["pull 0"] * 2]


def test_subtasks_that_the_policy_said_itself_are_no_targets_but_those_of_corrections_are(videos_copy: Path) -> None:
    episodes = pq.read_table(data_file(videos_copy), columns=["episode_index", "frame_index"]).to_pydict()
    corrected = [e == 0 and f > 6 for e, f in zip(*episodes.values(), strict=True)]
    rewrite(data_file(videos_copy), intervention=corrected)
    taught = open_source(videos_copy, episodes=[0], val_fraction=0)
    assert all(taught[index].subtask_is_target for index in range(12))
    (videos_copy / "meta" / "pi05_collect.json").write_text("{}")
    own = open_source(videos_copy, episodes=[0], val_fraction=0)
    assert [own[index].subtask for index in range(12)] == [taught[index].subtask for index in range(12)]
    assert [own[index].subtask_is_target for index in range(12)] == [index > 6 for index in range(12)]
    assert own.indices(Modality.HL_SUBTASK).tolist() == [7, 8, 9, 10, 11]


def test_subtasks_of_older_datasets_come_from_their_table(videos_copy: Path) -> None:
    codes = [1] * 10 + [0] * (sum(LENGTHS) - 10)
    rewrite(data_file(videos_copy), language_persistent=None, subtask_index=codes)
    table = pa.table({"subtask": ["pull", "reach"], "subtask_index": [0, 1]})
    pq.write_table(table, videos_copy / "meta" / "subtasks.parquet")
    source = open_source(videos_copy)
    assert [source[9].subtask, source[10].subtask] == ["reach", "pull"]


def test_subtasks_can_be_a_text_column(videos_copy: Path) -> None:
    rewrite(data_file(videos_copy), phase=["grasp", None] + ["lift"] * (sum(LENGTHS) - 2))
    source = open_source(videos_copy, subtask_key="phase")
    assert [source[i].subtask for i in range(3)] == ["grasp", None, "lift"]


def test_questions_go_with_their_answers_and_camera(videos: Path) -> None:
    source = open_source(videos, cameras=None)
    assert source[3].answers == (
        Answer("detect the handle", "<loc0001><loc0002><loc0003><loc0004>", "top"),
        Answer("what colour is it?", "red", "top"),
        Answer("is it closed?", "no", "wrist"),
    )


def test_questions_about_cameras_that_are_not_read_are_left_out(videos: Path) -> None:
    source = open_source(videos, cameras={"observation.images.wrist": "hand"})
    assert source[3].answers == (Answer("is it closed?", "no", "hand"),)


def test_indices_are_the_frames_that_can_teach_a_modality(videos: Path) -> None:
    source = open_source(videos, cameras=None)
    assert source.indices(Modality.QA).tolist() == [int(start) + 3 for start in STARTS[:-1]]
    assert len(source.indices(Modality.HL_SUBTASK)) == sum(LENGTHS) - 2 * len(LENGTHS)
    assert len(source.indices(Modality.FAST)) == sum(LENGTHS)
    assert len(source.indices(Modality.WEB_CAPTION)) == 0


# --- configuration


def test_configuration_comes_from_yaml(videos: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--source", type=LeRobotConfig)
    yaml = json.dumps({"path": str(videos), "episodes": "length > 3", "cameras": {"observation.images.top": "base"}})
    config = parser.instantiate(parser.parse_args([f"--source={yaml}"])).source
    assert config == LeRobotConfig(str(videos), cameras={"observation.images.top": "base"}, episodes="length > 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cameras": {"observation.images.left": "left"}},
            r"no image feature 'observation.images.left' .*; it has .*top",
        ),
        ({"cameras": {f"observation.images.{c}": "x" for c in ("top", "wrist")}}, "share a camera name"),
        ({"action_keys": ["act"]}, r"no vector 'act' \(did you mean action\?\); it has action, obs"),
        ({"episodes": [3, 99]}, r"no episodes \[99\]"),
        ({"episodes": "length >"}, "no SQL condition .*Columns: episode_index"),
        ({"episodes": "length > 100"}, "leaves none"),
        ({"horizon_seconds": 0.25}, "2.5 frames at 10 fps"),
        ({"horizon_seconds": 2}, "horizon of 8"),
        ({"tolerance_s": 0.1}, "half a frame"),
        ({"val_fraction": 1}, "left to train on"),
    ],
)
def test_a_wrong_configuration_says_what_is_right(videos: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(videos, **options)


def test_episode_conditions_cannot_read_other_files(videos: Path) -> None:
    with pytest.raises(ValueError, match="disabled"):
        open_source(videos, episodes="length > (SELECT count(*) FROM read_csv('/etc/passwd'))")


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        open_source(tmp_path / "absent")


def test_a_name_finds_what_lerobot_recorded_which_is_not_the_hubs(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HOME", videos.parent.parent)
    name = f"{videos.parent.name}/{videos.name}"
    assert find_dataset(name) == videos
    for path in (name, str(videos)):
        assert_published_as(path, None)


def assert_published_as(path: str, hub_id: str | None) -> None:
    source = open_source(Path(path))
    robot = source.robot()
    assert robot is not None
    assert (source.hub_id, robot.dataset, robot.is_on_hub) == (hub_id, path, hub_id is not None)


def test_what_was_downloaded_is_found_without_the_hub(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, commit = tmp_path / "home", "0" * 40
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HOME", home)
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HUB_CACHE", home / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the Hub does not give it"):
        find_dataset("someone/drawers")
    old = home / "someone" / "drawers"  # as an older LeRobot downloaded it
    shutil.copytree(videos, old)
    (old / ".cache" / "huggingface" / "download").mkdir(parents=True)
    assert find_dataset("someone/drawers") == old
    assert_published_as("someone/drawers", "someone/drawers")
    kept = home / "hub" / "datasets--someone--cups"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "v3.0").write_text(commit)
    shutil.copytree(videos, kept / "snapshots" / commit)
    for name in ("someone/cups", f"someone/cups@{commit}"):
        assert find_dataset(name) == kept / "snapshots" / commit
        assert_published_as(name, name)
    with pytest.raises(ValueError, match="someone/drawers@main"):  # what is beside the cache is of no revision
        find_dataset("someone/drawers@main")


# --- workers


@pytest.mark.slow
def test_a_spawned_worker_gets_the_same_frames_from_a_few_bytes(videos: Path) -> None:
    source = open_source(videos, cameras=None)
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=[5, 30],
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    for index, frame in zip([5, 30], loader, strict=True):
        np.testing.assert_array_equal(frame.images["top"], source[index].images["top"])


def test_forked_workers_read_videos_that_the_parent_has_open(videos: Path) -> None:
    source = open_source(videos, cameras=None)
    expected = [source[index].images["wrist"] for index in range(len(source))]
    loader = DataLoader(
        source, batch_size=None, num_workers=2, multiprocessing_context=multiprocessing.get_context("fork")
    )
    for image, frame in zip(expected, loader, strict=True):
        np.testing.assert_array_equal(np.asarray(frame.images["wrist"]), image)


# --- bad data


def damage_value(root: Path, key: str, row: int, value: float | None) -> None:
    values = pq.read_table(data_file(root))[key].to_pylist()
    values[row][1] = value
    rewrite(data_file(root), **{key: values})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_values_that_are_not_finite_are_found_on_opening(videos_copy: Path, key: str, value: float) -> None:
    damage_value(videos_copy, key, 14, value)
    with pytest.raises(BadSample, match=rf"dataset 'robot', episode 1, frame 2, {key}: value 1 is (nan|inf)\..* skip"):
        open_source(videos_copy)


def test_a_null_is_found_like_nan(videos_copy: Path) -> None:
    damage_value(videos_copy, "action", 14, None)
    with pytest.raises(BadSample, match="episode 1, frame 2, action"):
        open_source(videos_copy)


def test_skipping_leaves_out_every_chunk_that_holds_the_bad_action(
    videos_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_value(videos_copy, "action", 20, float("nan"))  # episode 1, frame 8
    with caplog.at_level(logging.WARNING):
        source = open_source(videos_copy, on_bad_sample="skip")
    assert len(source) == sum(LENGTHS) - HORIZON
    assert source.rejects.frames == HORIZON
    assert "dataset 'robot', episode 1, frame 8, action" in caplog.text
    assert all(np.isfinite(source[index].actions).all() for index in range(len(source)))


def test_a_width_that_differs_from_the_metadata_is_an_error(videos_copy: Path) -> None:
    values = pq.read_table(data_file(videos_copy))["action"].to_pylist()
    values[13] = [1.0, 2.0, 3.0]
    rewrite(data_file(videos_copy), action=values)
    with pytest.raises(BadSample, match=r"episode 1, frame 1, action: 3 values where meta/info.json says 2"):
        open_source(videos_copy)


def test_skipping_leaves_out_the_chunks_of_a_row_of_another_width_alone(videos_copy: Path) -> None:
    values = pq.read_table(data_file(videos_copy))["action"].to_pylist()
    values[13] = [1.0, 2.0, 3.0]
    rewrite(data_file(videos_copy), action=values)
    source = open_source(videos_copy, on_bad_sample="skip")
    assert set(range(sum(LENGTHS))) - set(source._rows) == {12, 13}  # of the episode that begins with row 12


def test_a_missing_task_is_an_error_unless_one_is_given(videos_copy: Path) -> None:
    rewrite(data_file(videos_copy), task_index=[0] * 20 + [7] * (sum(LENGTHS) - 20))
    with pytest.raises(BadSample, match="episode 1, frame 8, task_index: it has no task sentence"):
        open_source(videos_copy)
    assert open_source(videos_copy, task="tidy up")[20].task == "tidy up"


@pytest.mark.parametrize("none", [pa.int64(), pa.float64(), pa.dictionary(pa.int8(), pa.int64())], ids=str)
def test_a_row_without_a_task_is_the_only_one_left_out(pictures_copy: Path, none: pa.DataType) -> None:
    codes = [None if row == 14 else 0 for row in range(sum(LENGTHS))]
    values = pa.array(codes).dictionary_encode() if pa.types.is_dictionary(none) else pa.array(codes, none)
    rewrite(data_file(pictures_copy), task_index=values)
    with pytest.raises(BadSample, match="episode 1, frame 2, task_index: it has no task sentence"):
        open_source(pictures_copy)
    assert len(open_source(pictures_copy, on_bad_sample="skip")) == sum(LENGTHS) - 1


def test_a_question_without_answer_is_an_error(videos_copy: Path) -> None:
    rows = pq.read_table(data_file(videos_copy))["language_events"].to_pylist()
    del rows[3][0]
    rewrite(data_file(videos_copy), language_events=rows)
    with pytest.raises(BadSample, match="episode 0, frame 3, language_events: 2 vqa questions"):
        open_source(videos_copy)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "episodes 0 to 4: .*file-000.parquet is damaged"),
        (Path.unlink, "episodes 0 to 4: .*file-000.parquet is missing"),
        (lambda path: rewrite(path, action=None), r"file-000.parquet has no columns \['action'\]"),
        (lambda path: pq.write_table(pq.read_table(path)[:-3], path), "episode 4: .* has 8 of its 11 frames"),
        (lambda path: rewrite(path, frame_index=[0] * sum(LENGTHS)), "episode 0: its frames are out of order"),
    ],
    ids=["truncated", "missing", "column", "rows", "order"],
)
def test_a_damaged_data_file_is_an_error_with_the_episode(videos_copy: Path, damage, message: str) -> None:
    damage(data_file(videos_copy))
    with pytest.raises(BadSample, match=f"dataset 'robot', .*{message}"):
        open_source(videos_copy)


def test_skipping_leaves_out_an_incomplete_episode(videos_copy: Path) -> None:
    path = data_file(videos_copy)
    pq.write_table(pq.read_table(path)[:-3], path)
    assert set(open_source(videos_copy, on_bad_sample="skip").episode) == {0, 1, 2, 3}


def test_an_empty_episode_is_an_error(videos_copy: Path) -> None:
    path = next((videos_copy / "meta" / "episodes").glob("*/*.parquet"))
    rewrite(path, length=[*LENGTHS[:-1], 0])
    with pytest.raises(BadSample, match="dataset 'robot', episode 4: it has no frames"):
        open_source(videos_copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "meta/info.json").unlink(), "no meta/info.json"),
        (lambda root: (root / "meta/info.json").write_text("{"), "info.json is not valid JSON"),
        (lambda root: edit_info(root, features=None), "info.json lacks features"),
        (
            lambda root: edit_info(root, features={"action": {"shape": [2]}}),
            "the feature action lacks its dtype or shape",
        ),
        (lambda root: edit_info(root, video_path=None), "images.top is a video, and video_path does not say where"),
        (lambda root: edit_info(root, codebase_version="v2.1"), "format v2.1.*convert"),
        (lambda root: next((root / "meta/episodes").glob("*/*")).unlink(), "not finalised"),
        (lambda root: truncate(next((root / "meta/episodes").glob("*/*"))), "restore it"),
    ],
    ids=["none", "json", "features", "a feature", "video path", "version", "unfinished", "truncated"],
)
def test_damaged_metadata_is_named(videos_copy: Path, damage, message: str) -> None:
    damage(videos_copy)
    with pytest.raises(ValueError, match=message):
        open_source(videos_copy)
