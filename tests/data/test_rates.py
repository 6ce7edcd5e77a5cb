"""The rate of a dataset: fps of meta/info.json, the timestamps and the videos say the same, or it is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.errors import BadSample
from tests.data.recorded import HORIZON, LENGTHS, data_file, edit_info, open_source, rewrite

FRAMES = np.concatenate([np.arange(length) for length in LENGTHS])
EPISODES = np.repeat(np.arange(len(LENGTHS)), LENGTHS)


def set_times(root: Path, times: np.ndarray) -> None:
    rewrite(data_file(root), timestamp=times.astype(np.float32).tolist())


@pytest.mark.parametrize("fps", [0, -30, float("nan"), float("inf"), None, "10", True])
def test_fps_is_a_positive_number(pictures_copy: Path, fps) -> None:
    edit_info(pictures_copy, fps=fps)
    with pytest.raises(ValueError, match=r"meta/info.json: fps is .*: write the number of frames a second"):
        open_source(pictures_copy)


@pytest.mark.parametrize("rate", [5, 9, 11, 20, 29.97])
def test_timestamps_at_another_rate_than_fps_are_refused(pictures_copy: Path, rate: float) -> None:
    set_times(pictures_copy, FRAMES / rate)
    named = (
        rf"episode 0: its timestamps come at {rate:g}.* a second, and fps in meta/info.json is 10. .*file-000.parquet"
    )
    with pytest.raises(BadSample, match=named):
        open_source(pictures_copy)


def test_one_episode_at_another_rate_is_left_out_where_that_is_wanted(pictures_copy: Path) -> None:
    set_times(pictures_copy, np.where(EPISODES == 2, FRAMES / 15, FRAMES / 10))
    with pytest.raises(BadSample, match="episode 2: its timestamps come at 15"):
        open_source(pictures_copy)
    source = open_source(pictures_copy, on_bad_sample="skip")
    assert set(source.episode) == {0, 1, 3, 4}
    assert source.rejects.frames == LENGTHS[2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda times: np.zeros_like(times), "frame 1 is at 0 s, after 0 s"),
        (lambda times: times[::-1].copy(), "frame 1 is at .* s, after"),
        (lambda times: np.where(np.arange(len(times)) == 4, np.nan, times), "frame 4 is at nan s, after 0.3 s"),
        (lambda times: np.where(np.arange(len(times)) == 0, np.nan, times), "frame 0 is at nan s"),
    ],
    ids=["all zero", "backwards", "one is missing", "the first is missing"],
)
def test_timestamps_that_do_not_increase_are_refused(pictures_copy: Path, change, named: str) -> None:
    set_times(pictures_copy, change(FRAMES / 10))
    with pytest.raises(BadSample, match=rf"episode 0: its timestamps do not increase: {named}"):
        open_source(pictures_copy)


def test_a_clock_that_ran_beside_the_robot_may_jitter(pictures_copy: Path) -> None:
    set_times(pictures_copy, FRAMES / 10 + np.random.default_rng(0).uniform(-0.02, 0.02, len(FRAMES)))
    assert len(open_source(pictures_copy)) == sum(LENGTHS)


def test_a_rate_of_29_97_counts_as_30(pictures_copy: Path) -> None:
    edit_info(pictures_copy, fps=30)
    set_times(pictures_copy, FRAMES / 29.97)
    assert len(open_source(pictures_copy)) == sum(LENGTHS)


def test_a_video_at_another_rate_is_refused_when_the_dataset_is_opened(videos_copy: Path) -> None:
    edit_info(videos_copy, fps=15)
    set_times(videos_copy, FRAMES / 15)
    named = r"observation.images.top: .*file-000.mp4 has 10 frames a second, and fps in meta/info.json is 15"
    with pytest.raises(BadSample, match=named):
        open_source(videos_copy, cameras=None)
    assert len(open_source(videos_copy)) == sum(LENGTHS)


def test_a_video_of_twice_the_rate_has_every_frame(videos_copy: Path) -> None:
    expected = open_source(videos_copy, cameras=None)[4].images["top"]
    path = data_file(videos_copy)
    pq.write_table(pq.read_table(path).filter(pc.bit_wise_and(pc.field("frame_index"), 1) == 0), path)
    meta = next((videos_copy / "meta" / "episodes").glob("*/*.parquet"))
    rewrite(meta, length=[-(-length // 2) for length in LENGTHS])
    edit_info(videos_copy, fps=5)
    source = open_source(videos_copy, cameras=None)
    assert len(source) == sum(-(-length // 2) for length in LENGTHS)
    np.testing.assert_array_equal(source[2].images["top"], expected)


def test_an_episode_beyond_the_end_of_its_video_is_refused_when_the_dataset_is_opened(videos_copy: Path) -> None:
    meta = next((videos_copy / "meta" / "episodes").glob("*/*.parquet"))
    column = "videos/observation.images.top/from_timestamp"
    rewrite(meta, **{column: [*pq.read_table(meta)[column].to_pylist()[:-1], 100.0]})
    with pytest.raises(
        BadSample, match=r"episode 4, frame 0, .*top: .*mp4 ends at 5.4000 s, and this frame is at 100.00"
    ):
        open_source(videos_copy, cameras=None)
    assert set(open_source(videos_copy, cameras=None, on_bad_sample="skip").episode) == {0, 1, 2, 3}


# --- frames that somebody left out


def drop_idle(root: Path, retime: bool = False) -> np.ndarray:
    """Leave out frames 3 and 4 of every episode; the rows that stay."""
    table = pq.read_table(data_file(root))
    kept = np.flatnonzero(~np.isin(FRAMES, (3, 4)))
    pq.write_table(table.take(kept), data_file(root))
    meta = next((root / "meta" / "episodes").glob("*/*.parquet"))
    rewrite(meta, length=[length - 2 for length in LENGTHS])
    if retime:
        set_times(root, np.concatenate([np.arange(length - 2) for length in LENGTHS]) / 10)
    return kept


def test_a_chunk_goes_on_over_frames_that_were_left_out_as_in_lerobot(
    pictures_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kept = drop_idle(pictures_copy)
    meta = next((pictures_copy / "meta" / "episodes").glob("*/*.parquet"))
    ends = np.cumsum([length - 2 for length in LENGTHS])
    rewrite(meta, dataset_to_index=ends.tolist(), dataset_from_index=[0, *ends[:-1].tolist()])
    rewrite(data_file(pictures_copy), index=list(range(len(kept))))
    deltas = {"action": [step / 10 for step in range(HORIZON)]}
    reference = LeRobotDataset("robot", root=pictures_copy, delta_timestamps=deltas)
    with caplog.at_level(logging.WARNING):
        source = open_source(pictures_copy)
    assert len(source) == len(kept)
    for index in range(len(source)):
        query, pad = reference.reader._get_query_indices(index, int(source.episode[index]))
        np.testing.assert_array_equal(source[index].action_is_pad, pad["action_is_pad"].numpy())
        np.testing.assert_array_equal(
            source[index].actions, reference.reader._query_hf_dataset(query)["action"].numpy()
        )
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("pi05_lightning")]
    assert "between 5 of its frames and the next, the first in episode 0, frame 2, some were left out" in warning


def test_frames_that_were_left_out_and_timed_anew_need_no_word(
    pictures_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = drop_idle(pictures_copy, retime=True)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(pictures_copy)) == len(kept)
    assert not caplog.records


def test_images_of_frames_that_stay_are_their_own(videos_copy: Path) -> None:
    whole = open_source(videos_copy, cameras=None)
    expected = [whole[index].images["wrist"] for index in range(len(whole))]
    kept = drop_idle(videos_copy)
    source = open_source(videos_copy, cameras=None)
    for index, row in enumerate(kept):
        np.testing.assert_array_equal(source[index].images["wrist"], expected[row])
    assert source.address(3) == "dataset 'robot', episode 0, frame 5"


def test_relative_statistics_pair_the_frames_that_chunks_pair(pictures_copy: Path) -> None:
    drop_idle(pictures_copy)
    options = {"action_keys": ["observation.state"], "relative_dims": [0, 1, 2]}
    source = open_source(pictures_copy, **options)
    offsets = [
        frame.actions[~frame.action_is_pad] - frame.state for frame in (source[index] for index in range(len(source)))
    ]
    _, found = source.statistics()
    np.testing.assert_allclose(found.q99, np.quantile(np.concatenate(offsets), 0.99, axis=0), rtol=1e-6)
