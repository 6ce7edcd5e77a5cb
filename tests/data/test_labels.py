"""Labels fit their dataset and their value, frame by frame, or they are refused; the dataset itself stays as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.attempts import Attempts
from pi05_lightning.data.labels import POSITIVE, Labels
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource

LENGTHS = (12, 9, 15, 7, 11)  # of the recorded episodes


def opened(dataset: Path, labels: Path | str, **options: object) -> LeRobotSource:
    return LeRobotSource(LeRobotConfig(str(dataset), labels=str(labels), **options), "robot", "train", 3, (14, 14))


def column(values: list, name: str, kind: pa.DataType, dataset: Path) -> None:
    """Add a column to the frames of a dataset."""
    (path,) = (dataset / "data").glob("*/*.parquet")
    pq.write_table(pq.read_table(path).append_column(name, pa.array(values, kind)), path)


@pytest.fixture
def labelled(pictures_copy: Path) -> tuple[Path, Path]:
    """A dataset and its labels: of even frames the advantage is positive."""
    files = LeRobotFiles.open(pictures_copy)
    attempts = Attempts.read(files, demonstrations=True)
    columns = {"return": (-attempts.left / 15).astype(np.float32), "positive": attempts.frame % 2 == 0}
    path = pictures_copy.with_name("copy.labels.parquet")
    Labels(attempts.episode, attempts.frame, columns, {"value": None}).write(path, files)
    return pictures_copy, path


def rewrite(path: Path, change) -> None:
    """The same labels with other columns."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def test_every_frame_says_its_own_sign_and_return(labelled: tuple[Path, Path]) -> None:
    source = opened(*labelled, val_fraction=0.2)
    assert source.tells_advantage
    for index in range(len(source)):
        place, frame = source.place(index), source[index]
        assert frame.advantage == ("positive" if place["frame_index"] % 2 == 0 else "negative")
        left = LENGTHS[int(place["episode_index"])] - 1 - place["frame_index"]
        assert frame.returns == pytest.approx(-left / 15)


def test_demonstrations_need_no_file(pictures: Path) -> None:
    assert {opened(pictures, "positive")[index].advantage for index in range(3)} == {"positive"}


def test_nobody_says_anything_of_frames_without_labels(pictures: Path) -> None:
    source = LeRobotSource(LeRobotConfig(str(pictures)), "robot", "train", 3, (14, 14))
    assert not source.tells_advantage
    assert source[0].advantage is source[0].returns is None


def test_missing_file_names_the_command_that_makes_it(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset 'robot', labels: .*none.parquet does not exist.*pi05 value label"):
        opened(pictures, tmp_path / "none.parquet")


def test_missing_frame_is_not_taken_for_negative(labelled: tuple[Path, Path]) -> None:
    rewrite(labelled[1], lambda table: table.slice(0, len(table) - 1))
    with pytest.raises(ValueError, match="none of episode 4, frame 10"):
        opened(*labelled)


@pytest.mark.parametrize(("name", "bad"), [("return", np.nan), ("return", None), ("positive", None)])
def test_number_that_is_none_is_refused_with_its_place(labelled: tuple[Path, Path], name: str, bad: object) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[13] = bad
        place = table.column_names.index(name)
        return table.set_column(place, name, pa.array(values, table.schema.field(name).type))

    rewrite(labelled[1], spoil)
    with pytest.raises(ValueError, match=f"{name} is not a number at episode 1, frame 1"):
        opened(*labelled)


@pytest.mark.parametrize("key", ["action", "observation.gripper"])  # by the policy's own names too
def test_changed_dataset_refuses_its_old_labels(labelled: tuple[Path, Path], key: str) -> None:
    def move(table: pa.Table) -> pa.Table:
        values = table[key].to_pylist()
        values[40] = [value + 1e-3 for value in values[40]] if isinstance(values[40], list) else values[40] + 1e-3
        place = table.column_names.index(key)
        return table.set_column(place, key, pa.array(values, table.schema.field(key).type))

    rewrite(next((labelled[0] / "data").glob("*/*.parquet")), move)
    with pytest.raises(ValueError, match=r"of another dataset than .*or that was changed since"):
        opened(*labelled)


def test_value_that_was_fitted_again_refuses_its_old_labels(labelled: tuple[Path, Path], tmp_path: Path) -> None:
    dataset, path = labelled
    old = Labels.read(path, LeRobotFiles.open(dataset))
    about = {"value": str(tmp_path), "sha256": "a"}
    Labels(old.episode, old.frame, old.columns, about).write(path, LeRobotFiles.open(dataset))
    opened(dataset, path)
    (tmp_path / "value.json").write_text(json.dumps({"sha256": "a"}))
    opened(dataset, path)
    (tmp_path / "value.json").write_text(json.dumps({"sha256": "b"}))
    with pytest.raises(ValueError, match="fitted again"):
        opened(dataset, path)


def test_file_of_something_else_is_refused(pictures: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"positive": [True]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no file of labels"):
        opened(pictures, tmp_path / "other.parquet")


def test_writing_labels_changes_nothing_of_the_dataset(pictures_copy: Path) -> None:
    def digest() -> dict[str, str]:
        files = sorted(path for path in pictures_copy.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before, files = digest(), LeRobotFiles.open(pictures_copy)
    attempts = Attempts.read(files, demonstrations=True)
    Labels(attempts.episode, attempts.frame, {}, {}).write(pictures_copy.with_name("l.parquet"), files)
    assert digest() == before


def test_success_is_read_from_the_frames_as_lerobot_writes_it(pictures_copy: Path) -> None:
    ends = [frame == length - 1 and episode != 2 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(ends, "next.success", pa.bool_(), pictures_copy)
    attempts = Attempts.read(LeRobotFiles.open(pictures_copy))
    assert {int(e) for e in attempts.episode[~attempts.success]} == {2}
    assert attempts.longest == {"close the drawer": 15, "open the drawer": 9}


@pytest.mark.parametrize("name", ["intervention", "complementary_info.is_intervention"])
def test_interventions_are_read_by_the_names_that_lerobot_gives_them(pictures_copy: Path, name: str) -> None:
    corrected = [episode == 1 and frame > 4 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(corrected, name, pa.bool_(), pictures_copy)
    attempts = Attempts.read(LeRobotFiles.open(pictures_copy), demonstrations=True)
    assert attempts.intervention.tolist() == corrected


def test_corrections_alone_can_be_trained_on(pictures_copy: Path) -> None:
    corrected = [episode == 1 and frame > 4 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(corrected, "intervention", pa.bool_(), pictures_copy)
    config = LeRobotConfig(str(pictures_copy), val_fraction=0, frames="corrections")
    source = LeRobotSource(config, "robot", "train", 3, (14, 14))
    places = [source.place(index) for index in range(len(source))]
    assert [(place["episode_index"], place["frame_index"]) for place in places] == [(1, frame) for frame in range(5, 9)]


def test_chunks_of_a_correction_end_where_the_policy_acts_again(pictures_copy: Path) -> None:
    corrected = [episode == 1 and 3 <= frame < 6 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(corrected, "intervention", pa.bool_(), pictures_copy)

    def padding(**options: Any) -> dict[int, int]:
        """Of the chunks of the second episode, by frame."""
        config = LeRobotConfig(str(pictures_copy), val_fraction=0, **options)
        source = LeRobotSource(config, "robot", "train", 4, (14, 14))
        places = [source.place(index) for index in range(len(source))]
        return {
            p["frame_index"]: int(source[n].action_is_pad.sum())
            for n, p in enumerate(places)
            if p["episode_index"] == 1
        }

    assert padding(frames="corrections") == {3: 1, 4: 2, 5: 3}
    assert padding() == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 2, 8: 3}
    files, file = LeRobotFiles.open(pictures_copy), pictures_copy / "signs.parquet"
    attempts = Attempts.read(files, demonstrations=True)
    Labels(attempts.episode, attempts.frame, {POSITIVE: attempts.intervention}, {}).write(file, files)
    of_policy = {0: 0, 1: 0, 2: 0, 6: 1, 7: 2, 8: 3}
    assert padding(labels=str(file), frames="negative") == of_policy
    assert padding(labels=str(file)) == of_policy | {3: 1, 4: 2, 5: 3}


def test_held_out_episodes_without_corrections_are_no_reason_not_to_train(
    pictures_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = (14, 14)
    corrected = [episode == 1 and frame > 4 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(corrected, "intervention", pa.bool_(), pictures_copy)
    config = LeRobotConfig(str(pictures_copy), val_fraction=0.2, frames="corrections")
    held_out = {
        int(number) for number in LeRobotSource(replace(config, frames="all"), "robot", "val", 3, shape).episode
    }
    assert held_out
    assert 1 not in held_out
    assert len(LeRobotSource(config, "robot", "train", 3, shape)) == 4
    assert len(LeRobotSource(config, "robot", "val", 3, shape)) == 0
    assert "there is none of it to measure on" in caplog.text


def test_what_is_wrong_with_frames_that_are_not_chosen_is_not_counted(pictures_copy: Path) -> None:
    corrected = [episode == 1 and frame > 4 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(corrected, "intervention", pa.bool_(), pictures_copy)
    (path,) = (pictures_copy / "data").glob("*/*.parquet")
    rewrite(path, with_nan_state_at(0))
    config = LeRobotConfig(str(pictures_copy), val_fraction=0, on_bad_sample="skip")
    assert LeRobotSource(config, "robot", "train", 3, (14, 14)).rejects.frames == 1
    assert LeRobotSource(replace(config, frames="corrections"), "robot", "train", 3, (14, 14)).rejects.frames == 0


def test_an_incomplete_episode_counts_by_the_part_that_is_chosen(pictures_copy: Path) -> None:
    corrected = [episode == 1 and frame > 4 for episode, length in enumerate(LENGTHS) for frame in range(length)]
    column(corrected, "intervention", pa.bool_(), pictures_copy)
    (path,) = (pictures_copy / "data").glob("*/*.parquet")
    rewrite(path, lambda table: pa.concat_tables([table.slice(0, 30), table.slice(31)]))  # of episode 2's 15 frames
    config = LeRobotConfig(str(pictures_copy), val_fraction=0, frames="corrections", on_bad_sample="skip")
    source = LeRobotSource(config, "robot", "train", 3, (14, 14))
    assert (source.rejects.frames, len(source)) == (round(15 * 4 / 39), 4)


def with_nan_state_at(row: int) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        state = table["observation.state"].to_pylist()
        state[row] = [float("nan")] * len(state[row])
        place = table.column_names.index("observation.state")
        return table.set_column(place, "observation.state", pa.array(state, table.schema.field(place).type))

    return change


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_frames_of_one_sign_can_be_trained_on(labelled: tuple[Path, Path], sign: str) -> None:
    source = opened(*labelled, frames=sign, val_fraction=0)
    assert {source[index].advantage for index in range(len(source))} == {sign}
    assert len(source) == sum((length + (sign == "positive")) // 2 for length in LENGTHS)


def test_sign_that_nothing_tells_or_no_frame_has_is_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset 'robot': `frames: negative` needs `labels`"):
        LeRobotSource(LeRobotConfig(str(pictures), frames="negative"), "robot", "train", 3, (14, 14))
    with pytest.raises(ValueError, match=r"the train split of .* has no frame of `frames: negative`: leave it out"):
        opened(pictures, "positive", frames="negative")


def test_attempts_that_do_not_say_how_they_ended_are_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing says whether episode 0 succeeded: say so with `pi05 outcomes"):
        Attempts.read(LeRobotFiles.open(pictures))
