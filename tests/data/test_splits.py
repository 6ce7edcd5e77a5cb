"""Which episodes of a LeRobot dataset are trained on, and which are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.split import Split, held_out
from tests.data.recorded import data_file, edit_info, open_source, rewrite


def test_splits_are_those_that_the_dataset_names(videos_copy: Path) -> None:
    edit_info(videos_copy, splits={"train": "0:3", "val": "3:5"})
    assert set(open_source(videos_copy, "val").episode) == {3, 4}
    assert set(open_source(videos_copy, "train").episode) == {0, 1, 2}


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        ({"train": "0:3", "test": "3:5"}, {0, 1, 2}, set()),
        ({"train": "0:2", "val": "2:4", "test": "4:5"}, {0, 1}, {2, 3}),
        ({"train": "0:3"}, {0, 1, 2}, set()),
        ({"test": "0:2"}, {2, 3, 4}, set()),
        ({"validation": "0:1", "holdout": "1:2"}, {2, 3, 4}, {0}),
        ({"valid": "0:1"}, {1, 2, 3, 4}, {0}),
        ({"train": "1:9"}, {1, 2, 3, 4}, set()),
    ],
)
def test_what_is_not_declared_for_training_is_not_trained_on(
    videos_copy: Path, splits: dict[str, str], train: set[int], val: set[int]
) -> None:
    edit_info(videos_copy, splits=splits)
    assert set(open_source(videos_copy, "train").episode) == train
    assert set(open_source(videos_copy, "val").episode) == val


@pytest.mark.parametrize(
    ("splits", "test"),
    [
        ({"train": "0:3", "test": "3:5"}, {3, 4}),
        ({"train": "0:2", "val": "2:4", "test": "4:5"}, {4}),
        ({"training": "0:2", "dev": "2:4", "eval": "4:5"}, {4}),
        ({"train": "0:3"}, set()),
        ({}, set()),
    ],
)
def test_the_test_part_is_what_the_dataset_declares_as_such(
    videos_copy: Path, splits: dict[str, str], test: set[int]
) -> None:
    edit_info(videos_copy, splits=splits)
    assert set(open_source(videos_copy, "test", val_fraction=0.3).episode) == test
    assert not test & set(open_source(videos_copy, "train", val_fraction=0.3).episode)
    assert not test & set(open_source(videos_copy, "val", val_fraction=0.3).episode)


def test_validation_is_held_out_of_the_declared_training_episodes(pictures_copy: Path) -> None:
    edit_info(pictures_copy, splits={"train": "0:3", "test": "3:5"})
    train, val = (set(open_source(pictures_copy, split, val_fraction=0.3).episode) for split in ("train", "val"))
    assert (train, val) == ({0, 1}, {2})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [0, 1, 2]}, r"split train is \[0, 1, 2\], not first:end"),
        ({"val": "3-5"}, "split val is '3-5', not first:end"),
        ({"train": "0:4", "val": "3:5"}, r"splits train \(0:4\) and val \(3:5\) share episodes"),
        ({"train": "80%"}, "split train is '80%', not first:end"),
        ({"train": "4:0"}, "split train is '4:0', not first:end"),
        ({"train": "0:4", "test": "9:12"}, "split test is 9:12, and the dataset has 5 episodes"),
        ({"val": "0:1", "validation": "1:2"}, "val and validation are both the val part"),
        ({"train_set": "0:4"}, r"splits has train_set \(0:4\), and nothing that is called train"),
        (["0:4"], r"splits is \['0:4'\], not split by split"),
    ],
)
def test_splits_that_cannot_be_are_refused(videos_copy: Path, splits: dict | list, message: str) -> None:
    edit_info(videos_copy, splits=splits)
    with pytest.raises(ValueError, match=message):
        open_source(videos_copy)


def test_episodes_of_no_split_are_told(videos_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_info(videos_copy, splits={"train": "0:3"})
    open_source(videos_copy)
    assert "2 of 5 episodes, as number 3, are in none of its splits" in caplog.text


def test_a_split_of_an_unknown_name_is_told_once(videos_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_info(videos_copy, splits={"train": "0:3", "holdout": "3:5"})
    for split in ("train", "val"):
        open_source(videos_copy, split)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "info.json: the episodes of the splits holdout (3:5) are not used" in said


def test_training_and_validation_share_no_episode(videos: Path) -> None:
    train, val = (set(open_source(videos, split, val_fraction=0.4).episode) for split in ("train", "val"))
    assert train | val == set(range(5))
    assert not train & val


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(videos: Path, split: Split, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction is {fraction}"):
        open_source(videos, split, val_fraction=fraction)


# --- which episodes are held out


def sides(tasks: list[int], fraction: float = 0.1) -> np.ndarray:
    return held_out(tasks, [{task} for task in tasks], fraction)


@pytest.mark.parametrize("tasks", [1, 3, 21])
def test_an_episode_keeps_its_side_when_others_are_appended(tasks: int) -> None:
    every = [episode % tasks for episode in range(1000)]
    assert sides(every)[:50].tolist() == sides(every[:50]).tolist()


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_few_episodes_are_enough_for_both_sides(count: int) -> None:
    held = sides([0] * count)
    assert held.any()
    assert not held.all()


@pytest.mark.parametrize("count", [1, 6, 21, 34, 55, 89])
def test_the_share_held_out_is_the_one_asked_for_in_every_task_of_an_alternating_dataset(count: int) -> None:
    held = sides([episode % count for episode in range(1000 * count)])
    for task in range(count):
        assert held[task::count].mean() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("count", [4, 13, 21, 34, 55, 89])
def test_no_task_leaves_training_whatever_the_period_with_which_tasks_alternate(
    count: int, each: int, fraction: float
) -> None:
    tasks = np.arange(count * each) % count
    assert set(tasks[~sides(tasks.tolist(), fraction)]) == set(range(count))


def test_a_task_of_a_single_episode_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = record(tmp_path, [["open"], ["close"], ["push"], ["pull"]])
    assert set(open_source(root, val_fraction=0.1).episode) == {0, 1, 2, 3}
    assert not len(open_source(root, "val", val_fraction=0.1))
    assert "no episode is held out" in caplog.text


def test_a_task_of_some_frames_alone_is_trained_on(tmp_path: Path) -> None:
    """The frames say which task they have, whatever the episode table says."""
    root = record(tmp_path, [["open"] * 4, ["open", "open", "wipe", "wipe"], ["open"] * 4, ["open"] * 4])
    meta = next((root / "meta" / "episodes").glob("*/*.parquet"))
    rewrite(meta, tasks=[["open"]] * 4)
    train, val = (set(open_source(root, split, val_fraction=0.1).episode) for split in ("train", "val"))
    assert (train, val) == ({0, 1, 3}, {2})


@pytest.mark.parametrize("as_numbers", [False, True])
def test_no_subtask_leaves_training(tmp_path: Path, as_numbers: bool) -> None:
    root = record(tmp_path, [["open"] * 4] * 6)
    subtasks = [*["reach"] * 4, *["reach", "reach", "twist", "twist"], *["reach"] * 16]
    if as_numbers:
        names = ["reach", "twist"]
        pq.write_table(pa.table({"subtask": names, "subtask_index": [0, 1]}), root / "meta" / "subtasks.parquet")
        rewrite(data_file(root), subtask_index=[names.index(text) for text in subtasks])
    else:
        rewrite(data_file(root), words=subtasks)
    options = {"val_fraction": 0.1, "subtask_key": None if as_numbers else "words"}
    train, val = (set(open_source(root, split, **options).episode) for split in ("train", "val"))
    assert (train, val) == ({0, 1, 3, 4, 5}, {2})


def test_a_filter_takes_no_task_out_of_training(tmp_path: Path) -> None:
    root = record(tmp_path, [["open"], ["close"]] * 4)
    assert set(open_source(root, "val", val_fraction=0.1).episode) == {2, 5}
    without_the_first = {"episodes": [1, 2, 3, 4, 5], "val_fraction": 0.1}
    assert set(open_source(root, "val", **without_the_first).episode) == {2, 5}  # a filter changes no other side
    alone = {"episodes": [1, 2, 3], "val_fraction": 0.1}
    assert set(open_source(root, **alone).episode) == {1, 2, 3}
    assert not len(open_source(root, "val", **alone))


def test_what_validation_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = record(tmp_path, [["open"], ["close"], ["open"]])
    caplog.clear()
    assert set(open_source(root, "val", val_fraction=0.1).episode) == {2}
    (message,) = caplog.messages
    assert "validation has no episode with task 'close'" in message


def test_a_task_that_is_declared_for_validation_alone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = record(tmp_path, [["open"], ["close"], ["open"]])
    edit_info(root, splits={"train": "0:1", "val": "1:3"})
    assert set(open_source(root).episode) == {0}  # a declared split is the user's word
    assert "only the episodes declared for validation have task 'close'" in caplog.text


def record(folder: Path, tasks: list[list[str]]) -> Path:
    """A dataset of episodes with a task per frame."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {key: {"dtype": "float32", "shape": (2,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("pi05/tasks", 10, features, root=folder / "tasks", use_videos=False)
    for episode in tasks:
        for frame, task in enumerate(episode):
            values = np.array([frame, len(task)], np.float32)
            dataset.add_frame({"observation.state": values, "action": values, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return folder / "tasks"


# --- filters


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.2, "episodes": [0, 3]}])
def test_without_held_out_episodes_validation_is_empty(videos: Path, options: dict) -> None:
    assert len(open_source(videos, "val", **options)) == 0


@pytest.mark.parametrize("only", [[1, 3], "length < 10", "list_contains(tasks, 'open the drawer')"])
def test_episodes_are_chosen_by_number_or_condition(videos: Path, only: list[int] | str) -> None:
    assert set(open_source(videos, episodes=only).episode) == {1, 3}


def test_frames_of_chosen_episodes_keep_their_own_chunks(videos: Path) -> None:
    source = open_source(videos, episodes=[2, 4])
    np.testing.assert_array_equal(source[15].actions, [[4, step] for step in range(8)])
    assert source.address(16) == "dataset 'robot', episode 4, frame 1"
