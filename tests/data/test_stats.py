"""Statistics against numpy on whole columns, their cache, and what they say about bad data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.statistics import CACHE, Relative, Stats, compute, load_or_compute, vector_keys

KEYS = ["observation.state", "observation.gripper", "action"]


def data_file(root: Path) -> Path:
    (file,) = (root / "data").glob("*/*.parquet")
    return file


def column(root: Path, key: str) -> np.ndarray:
    table = pq.read_table(data_file(root))
    return np.array(table[key].to_pylist(), dtype=np.float64).reshape(len(table), -1)


def rewrite(root: Path, key: str, change: Callable[[list], None]) -> None:
    """Let `change` edit the list of a column's values."""
    table = pq.read_table(data_file(root))
    values = table[key].to_pylist()
    change(values)
    place = table.schema.get_field_index(key)
    kind = table.schema.field(key).type
    kind = pa.list_(kind.value_type) if pa.types.is_fixed_size_list(kind) else kind
    pq.write_table(table.set_column(place, key, pa.array(values, kind)), data_file(root))


# --- against numpy


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("memory", [1, 1 << 30], ids=["one dim a pass", "all at once"])
def test_statistics_are_numpys_on_the_whole_column(pictures: Path, key: str, memory: int) -> None:
    found, values = compute(pictures, [key], memory=memory)[key], column(pictures, key)
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    expected = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": low,
        "q99": high,
        "outside": ((values < low) | (values > high)).sum(0),
    }
    for name, reference in expected.items():
        np.testing.assert_allclose(getattr(found, name), reference, rtol=1e-6, atol=1e-12, err_msg=name)
    assert found.count == len(values)


def test_only_chosen_episodes_count(pictures: Path) -> None:
    episode = column(pictures, "episode_index")[:, 0]
    values = column(pictures, "observation.state")[np.isin(episode, [1, 4])]
    found = compute(pictures, ["observation.state"], episodes=[4, 1])["observation.state"]
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-6)
    assert found.count == len(values)


def test_many_files_are_one_dataset(pictures_copy: Path) -> None:
    table = pq.read_table(data_file(pictures_copy))
    expected = compute(pictures_copy, KEYS).to_dict()
    episode = table["episode_index"].to_numpy()
    second = data_file(pictures_copy).with_name("file-001.parquet")
    pq.write_table(table.filter(episode >= 3), second)
    pq.write_table(table.filter(episode < 3), second.with_name("file-000.parquet"))
    (meta,) = (pictures_copy / "meta" / "episodes").glob("*/*.parquet")
    episodes = pq.read_table(meta)
    files = pa.array((episodes["episode_index"].to_numpy() >= 3).astype(np.int64))
    place = episodes.schema.get_field_index("data/file_index")
    pq.write_table(episodes.set_column(place, "data/file_index", files), meta)
    found = compute(pictures_copy, KEYS).to_dict()
    for key in KEYS:
        np.testing.assert_allclose(found[key]["q99"], expected[key]["q99"], rtol=1e-12)
        assert found[key]["count"] == expected[key]["count"]


def test_relative_actions_count_every_step_of_a_chunk_in_its_episode(pictures: Path) -> None:
    horizon = 4
    found = compute(pictures, ["action"], relative=Relative(horizon, dims=(1,), state_dims=(2,)))["action"]
    action, state = column(pictures, "action"), column(pictures, "observation.state")
    episode = column(pictures, "episode_index")[:, 0]
    offsets = [
        action[later, 1] - state[now, 2]
        for now in range(len(action))
        for later in range(now, min(now + horizon, len(action)))
        if episode[later] == episode[now]
    ]
    np.testing.assert_allclose(found.q99[1], np.quantile(offsets, 0.99), rtol=1e-6)
    np.testing.assert_allclose(found.std[1], np.std(offsets), rtol=1e-6)
    np.testing.assert_allclose(found.mean[0], action[:, 0].mean(), rtol=1e-6)  # not relative: as it is


def test_constant_dims_are_told(pictures_copy: Path) -> None:
    rewrite(pictures_copy, "action", lambda values: values.__setitem__(slice(None), [[7.0, y] for _, y in values]))
    assert compute(pictures_copy, ["action"])["action"].constant.tolist() == [True, False]


def test_dims_that_rarely_move_are_told(pictures_copy: Path) -> None:
    def hold_still(values: list) -> None:
        for row in values:
            row[1] = 0.0
        values[20][1] = 1.0

    rewrite(pictures_copy, "observation.state", hold_still)
    # one in 54 frames is above 1 %: take the quantiles over copies of the data
    table = pq.read_table(data_file(pictures_copy))
    still = pa.concat_tables([table] + [table.slice(0, 20)] * 10)
    pq.write_table(still, data_file(pictures_copy))
    found = compute(pictures_copy, ["observation.state"])["observation.state"]
    assert found.zero_range.tolist() == [False, True, False]
    assert found.outside[1] == 1


def test_vector_keys_are_states_and_actions(videos: Path) -> None:
    assert vector_keys(LeRobotFiles.open(videos)) == KEYS


def test_quantiles_of_several_keys_are_concatenated(pictures: Path) -> None:
    stats = compute(pictures, KEYS)
    quantiles = stats.quantiles(["action", "observation.gripper"])
    expected = [*stats["action"].q01, *stats["observation.gripper"].q01]
    np.testing.assert_allclose(quantiles.q01, expected, rtol=1e-6)


# --- bad data


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_value_that_is_no_number_is_named(pictures_copy: Path, bad: float | None) -> None:
    rewrite(pictures_copy, "action", lambda values: values[14].__setitem__(1, bad))  # episode 0 has 12 frames
    with pytest.raises(BadSample, match=r"file-000\.parquet: episode 1, frame 2, action is"):
        compute(pictures_copy, KEYS)


def test_bad_values_in_other_episodes_do_not_matter(pictures_copy: Path) -> None:
    rewrite(pictures_copy, "action", lambda values: values[14].__setitem__(1, float("nan")))
    assert compute(pictures_copy, ["action"], episodes=[0, 2])["action"].count == 27


@pytest.mark.parametrize("row", [[1.0], [1.0, 2.0, 3.0]])
def test_a_row_of_another_width_is_named(pictures_copy: Path, row: list[float]) -> None:
    rewrite(pictures_copy, "action", lambda values: values.__setitem__(3, row))
    with pytest.raises(BadSample, match=r"episode 0, frame 3, action is .*expected 2 values"):
        compute(pictures_copy, ["action"])


@pytest.mark.parametrize("key", ["observation.images.top", "episode", "actions"])
def test_a_key_that_is_no_vector_is_an_error_that_names_those_that_are(videos: Path, key: str) -> None:
    with pytest.raises(ValueError, match=r"name one of \['observation\.state'"):
        compute(videos, [key])


def test_a_truncated_file_is_an_error(pictures_copy: Path) -> None:
    file = data_file(pictures_copy)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        compute(pictures_copy, KEYS)


def test_a_missing_file_is_an_error(pictures_copy: Path) -> None:
    data_file(pictures_copy).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_or_compute(pictures_copy, KEYS)


def test_an_unknown_episode_is_an_error(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"no episodes \[99\]"):
        compute(pictures, KEYS, episodes=[0, 99])


# --- keeping


def test_json_keeps_every_digit(pictures: Path) -> None:
    stats = compute(pictures, KEYS)
    assert Stats.from_dict(json.loads(json.dumps(stats.to_dict()))).to_dict() == stats.to_dict()


def test_the_names_are_lerobots(pictures: Path) -> None:
    lerobot = json.loads((pictures / "meta" / "stats.json").read_text())["action"]
    ours = compute(pictures, ["action"]).to_dict()["action"]
    names = {"mean", "std", "min", "max", "q01", "q99", "count"}
    assert names <= set(lerobot)
    assert names <= set(ours)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(ours[name], lerobot[name], rtol=1e-5, atol=1e-6)


def poison(root: Path) -> None:
    """Change a cached mean, so that whether the cache is read shows."""
    content = json.loads((root / CACHE).read_text())
    for entry in content["entries"].values():
        entry["action"]["mean"] = [123.0, 123.0]
    (root / CACHE).write_text(json.dumps(content))


def test_statistics_are_computed_once(pictures_copy: Path) -> None:
    load_or_compute(pictures_copy, KEYS)
    poison(pictures_copy)
    assert load_or_compute(pictures_copy, KEYS)["action"].mean[0] == 123.0


def test_a_change_of_the_data_is_noticed(pictures_copy: Path) -> None:
    load_or_compute(pictures_copy, KEYS)
    poison(pictures_copy)
    rewrite(pictures_copy, "action", lambda values: values[0].__setitem__(0, 0.5))
    assert load_or_compute(pictures_copy, KEYS)["action"].mean[0] != 123.0


@pytest.mark.parametrize(
    ("episodes", "relative"), [([0, 1], None), (None, Relative(3, (0,)))], ids=["episodes", "relative"]
)
def test_another_question_gets_another_answer(
    pictures_copy: Path, episodes: list[int] | None, relative: Relative | None
) -> None:
    load_or_compute(pictures_copy, KEYS)
    poison(pictures_copy)
    assert load_or_compute(pictures_copy, KEYS, episodes, relative)["action"].mean[0] != 123.0
    assert load_or_compute(pictures_copy, KEYS)["action"].mean[0] == 123.0  # and the first is kept


@pytest.mark.parametrize("version", [1, None])
def test_statistics_that_another_version_kept_are_computed_anew(pictures_copy: Path, version: int | None) -> None:
    load_or_compute(pictures_copy, KEYS)
    poison(pictures_copy)
    content = json.loads((pictures_copy / CACHE).read_text())
    (pictures_copy / CACHE).write_text(json.dumps(content | {"version": version}))
    assert load_or_compute(pictures_copy, KEYS)["action"].mean[0] != 123.0


def test_a_feature_may_be_called_filename(pictures_copy: Path) -> None:
    table = pq.read_table(data_file(pictures_copy))
    pq.write_table(table.append_column("filename", pa.array(["a"] * len(table))), data_file(pictures_copy))
    assert compute(pictures_copy, ["action"])["action"].count == 54


def test_a_damaged_cache_is_written_anew(pictures_copy: Path) -> None:
    (pictures_copy / CACHE).write_text('{"entries": {')
    load_or_compute(pictures_copy, KEYS)
    assert json.loads((pictures_copy / CACHE).read_text())["entries"]


def test_a_dataset_that_cannot_be_written_to_still_has_statistics(
    pictures_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", read_only)  # chmod does not stop root, as which tests may run
    assert load_or_compute(pictures_copy, KEYS)["action"].count == 54
    assert "read-only file system" in caplog.text
    assert not list((pictures_copy / CACHE).parent.glob(f"*{CACHE.name}*"))
