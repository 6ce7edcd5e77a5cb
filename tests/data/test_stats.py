"""Statistics against numpy on what is trained on: which frames and which steps, and what they say of single dims."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.sources.lerobot import LeRobotSource
from pi05_lightning.data.statistics import FeatureStats, vector_keys
from tests.data.recorded import HORIZON, LENGTHS, STARTS, data_file, open_source, rewrite

NAN = float("nan")
ROWS = sum(LENGTHS)
RELATIVE = {"relative_dims": [1], "relative_state_dims": [2]}


def column(root: Path, key: str) -> np.ndarray:
    table = pq.read_table(data_file(root))
    return np.array(table[key].to_pylist(), dtype=np.float64).reshape(len(table), -1)


def spoil(root: Path, *rows: int, key: str = "action") -> None:
    """NaN in dim 0 of some rows, beside a value that no statistics should see."""
    values = column(root, key)
    values[list(rows)] = [NAN, *[1e6] * (values.shape[1] - 1)]
    rewrite(data_file(root), **{key: values.astype(np.float32).tolist()})


def trained_on(source: LeRobotSource) -> tuple[np.ndarray, np.ndarray]:
    """States and chunks f64[N T A] of every frame of a source, NaN where steps are padding."""
    frames = [source[index] for index in range(len(source))]
    chunks = np.array([np.where(frame.action_is_pad[:, None], NAN, frame.actions) for frame in frames], np.float64)
    return np.array([frame.state for frame in frames], np.float64), chunks


def assert_quantiles(found: FeatureStats, values: np.ndarray, dims: slice = slice(None)) -> None:
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    np.testing.assert_allclose(found.q01[dims], low, rtol=1e-6)
    np.testing.assert_allclose(found.q99[dims], high, rtol=1e-6)


# --- against numpy


@pytest.mark.parametrize("key", ["observation.state", "observation.gripper", "action"])
def test_statistics_are_numpys_on_the_whole_column(pictures: Path, key: str) -> None:
    (found, _), values = open_source(pictures, state_keys=[key]).statistics(), column(pictures, key)
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    expected = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": low,
        "q99": high,
        "outside": ((values < low) | (values > high)).sum(0),
        "count": [ROWS] * values.shape[1],
    }
    for name, reference in expected.items():
        np.testing.assert_allclose(getattr(found, name), reference, rtol=1e-6, atol=1e-12, err_msg=name)


def test_the_names_are_lerobots(pictures: Path) -> None:
    lerobot = json.loads((pictures / "meta" / "stats.json").read_text())["action"]
    _, action = open_source(pictures).statistics()
    for name in ("mean", "std", "min", "max", "count"):
        np.testing.assert_allclose(getattr(action, name), np.broadcast_to(lerobot[name], 2), rtol=1e-5, atol=1e-6)


def test_only_chosen_episodes_count(pictures: Path) -> None:
    state, action = open_source(pictures, episodes=[1, 4]).statistics()
    chosen = np.isin(column(pictures, "episode_index")[:, 0], [1, 4])
    assert_quantiles(state, column(pictures, "observation.state")[chosen])
    assert_quantiles(action, column(pictures, "action")[chosen])


def test_relative_actions_count_every_step_of_a_chunk_in_its_episode(pictures: Path) -> None:
    source = open_source(pictures, horizon_steps=4, **RELATIVE)
    states, chunks = trained_on(source)
    offsets = (chunks[:, :, 1] - states[:, None, 2])[np.isfinite(chunks[:, :, 1])]
    _, action = source.statistics()
    assert_quantiles(action, offsets, dims=1)
    np.testing.assert_allclose(action.std[1], np.std(offsets), rtol=1e-6)
    np.testing.assert_allclose(action.mean[0], column(pictures, "action")[:, 0].mean(), rtol=1e-6)  # not relative
    assert action.count.tolist() == [ROWS, len(offsets)]


# --- what is left out as bad is in no statistics, and all else is


@pytest.mark.parametrize("episodes", [1, 4, 5])
def test_a_bad_frame_leaves_no_more_than_its_chunks_out_of_the_statistics(pictures_copy: Path, episodes: int) -> None:
    """One bad frame in every episode but those that are whole, and in all of them."""
    rows = (STARTS[:episodes] + 5).tolist()
    whole = column(pictures_copy, "action")
    spoil(pictures_copy, *rows)
    source = open_source(pictures_copy, on_bad_sample="skip")
    state, action = source.statistics()
    states, chunks = trained_on(source)
    assert_quantiles(state, states)
    held = {(episode, frame) for episode, frame in chunks.reshape(-1, 2).tolist() if np.isfinite(frame)}
    assert_quantiles(action, np.array([step for step in whole.tolist() if tuple(step) in held]))
    assert action.count.tolist() == [len(held)] * 2


def test_normalised_values_stay_in_range_with_a_bad_frame_in_nine_of_ten_episodes(tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {key: {"dtype": "float32", "shape": (2,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("pi05/bad", 10, features, root=tmp_path / "bad", use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(10):
        scale = 1.0 if episode < 9 else 0.02  # the only whole episode hardly moves
        for frame in range(60):
            values = (scale * rng.normal(size=2)).astype(np.float32)
            if episode < 9 and frame == 30:
                values[0] = np.nan
            dataset.add_frame({"observation.state": values, "action": values.copy(), "task": "wait"})
        dataset.save_episode()
    dataset.finalize()
    source = open_source(tmp_path / "bad", on_bad_sample="skip")
    robot = source.robot()
    assert robot is not None
    states, chunks = trained_on(source)
    for found, values in ((robot.normalize.state, states), (robot.normalize.action, chunks.reshape(-1, 2))):
        values = values[np.isfinite(values).all(axis=1)]
        assert np.quantile(np.abs(found.normalize(values)), 0.98) < 1.1


@pytest.mark.parametrize("dims", [{}, RELATIVE])
def test_the_state_of_a_frame_that_is_left_out_is_in_no_statistics(pictures_copy: Path, dims: dict) -> None:
    spoil(pictures_copy, 3, 20, key="observation.state")
    source = open_source(pictures_copy, on_bad_sample="skip", **dims)
    states, chunks = trained_on(source)
    state, action = source.statistics()
    assert len(source) == ROWS - 2
    assert_quantiles(state, states)
    if dims:
        assert_quantiles(action, (chunks[:, :, 1] - states[:, None, 2])[np.isfinite(chunks[:, :, 1])], dims=1)


def test_the_last_action_of_an_episode_counts_only_in_a_chunk_that_holds_it(pictures_copy: Path) -> None:
    """A bad state leaves a frame out, but its action is a step of the chunks before; not so at an episode's start."""
    first, last = int(STARTS[1]), int(STARTS[2]) - 1
    spoil(pictures_copy, first, last, key="observation.state")
    _, action = open_source(pictures_copy, on_bad_sample="skip", horizon_steps=2).statistics()
    assert action.count[0] == ROWS - 1
    assert_quantiles(action, np.delete(column(pictures_copy, "action"), first, axis=0))


def test_frames_without_video_are_in_no_statistics(videos_copy: Path) -> None:
    path = next((videos_copy / "meta" / "episodes").glob("*/*.parquet"))
    names = [f"videos/observation.images.top/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    table = pq.read_table(path)
    rewrite(path, **{name: [None, *table[name].to_pylist()[1:]] for name in names})
    source = open_source(videos_copy, cameras=None, on_bad_sample="skip")
    assert_quantiles(source.statistics()[0], column(videos_copy, "observation.state")[LENGTHS[0] :])


def test_statistics_are_of_the_data_as_it_is_now(pictures_copy: Path) -> None:
    """Whatever an earlier version kept beside the data, and whatever was asked before."""
    (pictures_copy / "meta" / "pi05_stats.json").write_text('{"version": 2, "entries": {"of something": {}}}')
    before = open_source(pictures_copy).robot()
    values = column(pictures_copy, "action") * 3
    stat = data_file(pictures_copy).stat()
    rewrite(data_file(pictures_copy), action=values.astype(np.float32).tolist())
    os.utime(data_file(pictures_copy), ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync -t and archives leave it
    after = open_source(pictures_copy).robot()
    assert before is not None
    assert after is not None
    np.testing.assert_allclose(after.normalize.action.q99, 3 * before.normalize.action.q99, rtol=1e-6)


# --- single dims


def test_constant_dims_are_told(pictures_copy: Path) -> None:
    rewrite(data_file(pictures_copy), action=[[7.0, float(y)] for _, y in column(pictures_copy, "action")])
    assert open_source(pictures_copy).statistics()[1].constant.tolist() == [True, False]


def test_dims_that_rarely_move_are_told() -> None:
    moves = np.arange(200.0)
    found = FeatureStats.of([moves, (moves == 20).astype(np.float64)])
    assert found.zero_range.tolist() == [False, True]
    assert found.outside[1] == 1


def test_one_dims_values_are_in_memory_at_a_time() -> None:
    count, rng = 100_000, np.random.default_rng(0)
    tracemalloc.start()
    try:
        FeatureStats.of(rng.random(count) for _ in range(3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * 8 * count


def test_vector_keys_are_states_and_actions(videos: Path) -> None:
    assert vector_keys(LeRobotFiles.open(videos)) == ["observation.state", "observation.gripper", "action"]


def test_quantiles_of_several_keys_are_concatenated(pictures: Path) -> None:
    both = ["observation.gripper", "observation.state"]
    found = open_source(pictures, state_keys=both).statistics()[0].quantiles
    values = np.concatenate([column(pictures, key) for key in both], axis=1)
    np.testing.assert_allclose(found.q01, np.quantile(values, 0.01, axis=0), rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, float("inf"), None])
def test_a_value_that_is_no_number_is_named(pictures_copy: Path, bad: float | None) -> None:
    values = column(pictures_copy, "action").tolist()
    values[14][1] = bad  # episode 0 has 12 frames
    rewrite(data_file(pictures_copy), action=values)
    with pytest.raises(BadSample, match="episode 1, frame 2, action: value 1 is"):
        open_source(pictures_copy)


def test_steps_past_the_chunk_are_no_steps(pictures: Path) -> None:
    assert open_source(pictures, horizon_steps=1, **RELATIVE).statistics()[1].count.tolist() == [ROWS, ROWS]
    per_episode = sum(min(HORIZON, length - frame) for length in LENGTHS for frame in range(length))
    assert open_source(pictures, **RELATIVE).statistics()[1].count.tolist() == [ROWS, per_episode]
