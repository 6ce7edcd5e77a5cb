"""Which data file holds an episode: what is in the files says it, as for LeRobot, not the numbers in meta/episodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.errors import BadSample
from tests.data.recorded import LENGTHS, data_file, open_source, rewrite


@pytest.fixture
def stale(pictures_copy: Path) -> Path:
    """Episodes 0 to 2 in one file, 3 and 4 in another of another chunk; meta/episodes says all are in the first."""
    path = data_file(pictures_copy)
    table = pq.read_table(path)
    other = pictures_copy / "data" / "chunk-001" / "file-007.parquet"
    other.parent.mkdir()
    pq.write_table(table.filter(pc.field("episode_index") >= 3), other)
    pq.write_table(table.filter(pc.field("episode_index") < 3), path)
    return pictures_copy


def test_frames_are_read_from_the_files_that_hold_them(stale: Path, pictures: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    reference, source = LeRobotDataset("robot", root=stale), open_source(stale, cameras=None)
    assert len(source) == len(reference) == sum(LENGTHS)
    expected = open_source(pictures, cameras=None)
    for index in range(0, len(source), 5):
        theirs = reference[index]
        np.testing.assert_array_equal(source[index].state, theirs["observation.state"].numpy())
        np.testing.assert_array_equal(source[index].images["top"], expected[index].images["top"])
        assert source[index].task == theirs["task"]


def test_statistics_are_of_the_files_that_hold_the_episodes(stale: Path, pictures: Path) -> None:
    for episodes in (None, [3, 4], [1, 4]):
        found, expected = (open_source(root, episodes=episodes).statistics()[1] for root in (stale, pictures))
        np.testing.assert_array_equal(found.q99, expected.q99)
        np.testing.assert_array_equal(found.count, expected.count)


def test_numbers_of_files_that_do_not_exist_do_not_matter(pictures_copy: Path) -> None:
    meta = next((pictures_copy / "meta" / "episodes").glob("*/*.parquet"))
    rewrite(meta, **{"data/file_index": [9] * len(LENGTHS), "data/chunk_index": None})
    assert len(open_source(pictures_copy)) == sum(LENGTHS)


def test_a_file_without_rows_holds_nothing(pictures_copy: Path) -> None:
    empty = data_file(pictures_copy).with_name("file-001.parquet")
    pq.write_table(pq.read_table(data_file(pictures_copy)).slice(0, 0), empty)
    assert len(open_source(pictures_copy)) == sum(LENGTHS)


def test_an_episode_in_two_files_is_refused(pictures_copy: Path) -> None:
    path = data_file(pictures_copy)
    shutil.copy(path, path.with_name("file-000 (copy).parquet"))
    with pytest.raises(BadSample, match=r"episode 0: its rows are in more than one file, .*file-000 \(copy\).parquet"):
        open_source(pictures_copy)


def test_an_episode_in_no_file_is_refused(pictures_copy: Path) -> None:
    path = data_file(pictures_copy)
    table = pq.read_table(path)
    pq.write_table(table.filter(pc.field("episode_index") != 3), path)
    with pytest.raises(BadSample, match=r"episodes 3 to 3: no file in .*/data has its rows"):
        open_source(pictures_copy)
    assert set(open_source(pictures_copy, on_bad_sample="skip").episode) == {0, 1, 2, 4}


def test_an_episode_that_meta_lists_twice_is_refused(pictures_copy: Path) -> None:
    meta = next((pictures_copy / "meta" / "episodes").glob("*/*.parquet"))
    shutil.copy(meta, meta.with_name("file-001.parquet"))
    with pytest.raises(ValueError, match=r"meta/episodes lists the episodes \[0, 1, 2, 3, 4\] more than once"):
        open_source(pictures_copy)
