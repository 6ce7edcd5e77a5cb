"""Which episodes of a LeRobot dataset are trained on, and which are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi05_lightning.data.split import held_out
from tests.data.recorded import edit_info, open_source


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


def test_validation_is_held_out_of_the_declared_training_episodes(videos_copy: Path) -> None:
    edit_info(videos_copy, splits={"train": "0:3", "test": "3:5"})
    train, val = (set(open_source(videos_copy, split, val_fraction=0.3).episode) for split in ("train", "val"))
    assert (train, val) == ({0, 2}, {1})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [0, 1, 2]}, r"split train is \[0, 1, 2\], not first:end"),
        ({"val": "3-5"}, "split val is '3-5', not first:end"),
        ({"train": "0:4", "val": "3:5"}, r"splits train \(0:4\) and val \(3:5\) share episodes"),
    ],
)
def test_splits_that_cannot_be_are_refused(videos_copy: Path, splits: dict, message: str) -> None:
    edit_info(videos_copy, splits=splits)
    with pytest.raises(ValueError, match=message):
        open_source(videos_copy)


def test_training_and_validation_share_no_episode(videos: Path) -> None:
    train, val = (set(open_source(videos, split, val_fraction=0.4).episode) for split in ("train", "val"))
    assert train | val == set(range(5))
    assert not train & val


def test_an_episode_keeps_its_side_when_others_are_added() -> None:
    assert held_out(np.arange(1000), 0.1)[:50].tolist() == held_out(np.arange(50), 0.1).tolist()


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_few_episodes_are_enough_for_both_sides(count: int) -> None:
    held = held_out(np.arange(count), 0.1)
    assert held.any()
    assert not held.all()


def test_the_share_held_out_is_the_one_asked_for_in_every_task_of_an_alternating_dataset() -> None:
    held = held_out(np.arange(6000), 0.1)
    for task in range(6):
        assert held[task::6].mean() == pytest.approx(0.1, abs=0.005)


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
