"""`pi05 outcomes`: what a person says of episodes counts as if it had been recorded, and nothing else changes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning.cli.main import main
from pi05_lightning.cli.outcomes import outcomes
from pi05_lightning.data.attempts import Attempts
from pi05_lightning.data.chosen_episodes import choose_episodes
from pi05_lightning.data.labels import fingerprint
from pi05_lightning.data.lerobot_files import LeRobotFiles

LENGTHS = (12, 9, 15, 7, 11)  # of the recorded episodes
FILE = Path("meta", "pi05_outcomes.json")


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in folder.rglob("*") if file.is_file()}


def ended(dataset: Path) -> list[bool]:
    attempts = Attempts.read(LeRobotFiles.open(dataset))
    return [bool(attempts.success[attempts.episode == number].all()) for number in range(len(LENGTHS))]


def test_what_is_said_bit_by_bit_is_how_they_ended(pictures_copy: Path) -> None:
    before = contents(pictures_copy)
    assert outcomes(pictures_copy)["unknown"] == [0, 1, 2, 3, 4]
    outcomes(pictures_copy, success="0, 2-3")
    assert outcomes(pictures_copy, failure="rest") == {"success": [0, 2, 3], "failure": [1, 4], "unknown": []}
    assert ended(pictures_copy) == [True, False, True, True, False]
    outcomes(pictures_copy, success="1", failure="2")
    assert ended(pictures_copy) == [True, True, False, True, False]
    after = contents(pictures_copy)
    after.pop(pictures_copy / FILE)
    assert after == before


def test_a_verdict_that_changes_is_told(pictures_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes(pictures_copy, success="0, 1", failure="2")
    assert ": was " not in capsys.readouterr().out
    outcomes(pictures_copy, success="0, 3", failure="1, 2")
    assert re.findall("episode .*: was .*", capsys.readouterr().out) == ["episode 1: was success, is failure"]


def test_episodes_are_chosen_by_what_was_said(pictures_copy: Path) -> None:
    outcomes(pictures_copy, success="0,3", failure="1")
    files = LeRobotFiles.open(pictures_copy)
    assert choose_episodes(files, "train", 0, "success").tolist() == [0, 3]
    assert choose_episodes(files, "train", 0, "NOT success").tolist() == [1]


def test_episodes_are_chosen_by_what_their_frames_say_too(pictures_copy: Path) -> None:
    """With or without anything that a person said, as all other commands read it."""
    (path,) = (pictures_copy / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    values = [{0: True, 3: True, 4: None}.get(number, False) for number in table["episode_index"].to_pylist()]
    pq.write_table(table.append_column("next.success", pa.array(values, pa.bool_())), path)
    for said, succeeded, failed in (({}, [0, 3], [1, 2]), ({"success": "1", "failure": "3"}, [0, 1], [2, 3])):
        known = outcomes(pictures_copy, **said)
        assert known == {"success": succeeded, "failure": failed, "unknown": [4]}
        files = LeRobotFiles.open(pictures_copy)
        assert choose_episodes(files, "train", 0, "Success").tolist() == succeeded
        assert choose_episodes(files, "train", 0, "NOT success AND length > 0").tolist() == failed


@pytest.mark.parametrize("column", ["success", "next.success"])
def test_it_counts_for_more_than_what_was_recorded(pictures_copy: Path, column: str) -> None:
    (path,) = (pictures_copy / ("data" if "." in column else "meta/episodes")).glob("*/*.parquet")
    table = pq.read_table(path)
    values = [number == 0 for number in table["episode_index"].to_pylist()]
    pq.write_table(table.append_column(column, pa.array(values, pa.bool_())), path)
    assert ended(pictures_copy) == [True, False, False, False, False]
    assert outcomes(pictures_copy, success="rest")["success"] == [0]
    outcomes(pictures_copy, success="4", failure="0")
    assert ended(pictures_copy) == [False, False, False, False, True]


def test_labels_of_what_was_known_before_are_stale(pictures_copy: Path) -> None:
    outcomes(pictures_copy, success="0-3", failure="4")
    before = fingerprint(LeRobotFiles.open(pictures_copy))
    outcomes(pictures_copy, success="4")
    assert fingerprint(LeRobotFiles.open(pictures_copy)) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--success", "0-7"], "has no episode 5: it has 5, from 0 on"),
        (["--success", "1-3", "--failure", "3"], "episode 3 is named as a success and as a failure"),
        (["--success", "rest", "--failure", "rest"], "the rest are named as successes and as failures"),
        (["--success", "first"], "'first' is no episode: write numbers and ranges, as 0-9, 12, or rest"),
        (["--success", "1, 4-2"], "'4-2' is no episode"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(pictures_copy: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["outcomes", str(pictures_copy), *options])
    assert not (pictures_copy / FILE).exists()


@pytest.mark.parametrize("episode", [0, 1])
def test_what_was_said_of_other_episodes_is_refused(pictures_copy: Path, episode: int) -> None:
    outcomes(pictures_copy, success="rest")
    said = json.loads((pictures_copy / FILE).read_text())
    (pictures_copy / FILE).write_text(json.dumps(said | {str(episode): {"success": True, "frames": 10}}))
    had = rf"is of other episodes: {episode} had 10 frames, and now has {LENGTHS[episode]}. Remove that file"
    with pytest.raises(ValueError, match=had):
        LeRobotFiles.open(pictures_copy)


@pytest.mark.parametrize(
    "content",
    ['["0"]', '{"first": true}', '{"0": {"success": true}}', '{"0": {"success": "no", "frames": 12}}', '{"0": 1}'],
)
def test_a_file_that_says_something_else_is_refused_by_its_name(pictures_copy: Path, content: str) -> None:
    (pictures_copy / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"meta/pi05_outcomes.json is not what `pi05 outcomes` writes"):
        LeRobotFiles.open(pictures_copy)


def test_what_was_recorded_as_unknown_stays_so(pictures_copy: Path) -> None:
    (path,) = (pictures_copy / "meta" / "episodes").glob("*/*.parquet")
    recorded = pa.array([1.0, 0.0, float("nan"), None, float("nan")])
    pq.write_table(pq.read_table(path).append_column("success", recorded), path)
    assert outcomes(pictures_copy) == {"success": [0], "failure": [1], "unknown": [2, 3, 4]}
    assert outcomes(pictures_copy, failure="3") == {"success": [0], "failure": [1, 3], "unknown": [2, 4]}
