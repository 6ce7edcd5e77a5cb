from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from pi05_lightning.files.local import held
from pi05_lightning.sim.demonstrations import lerobot_writer, questions
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.sim.demonstrations.episodes import record_episode
from pi05_lightning.sim.metaworld.environment import MetaWorld, MetaWorldEnvironment
from pi05_lightning.sim.metaworld.tasks import LANGUAGE
from pi05_lightning.sim.splits import split_seeds

from .conftest import TASKS, config, interrupted_by

BOX = re.compile(r"(?:<loc(\d{4})>){4}")


@pytest.fixture(scope="module")
def stock(collected):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/robot", root=collected / "robot", video_backend="pyav", return_uint8=True)


@pytest.fixture(scope="module")
def first_episode(collected):
    with MetaWorldEnvironment(TASKS[0]) as env:
        return record_episode(env, split_seeds("train", 1)[0], config(collected))


def columns(root: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(root / "robot" / "data", columns=["episode_index", "observation.state", "action"])
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def test_stock_lerobot_opens_all_episodes_in_their_splits(stock):
    assert stock.num_episodes == 8
    assert stock.meta.info.splits == {"train": "0:6", "val": "6:8"}
    assert {str(task) for task in stock.meta.tasks.index} == {LANGUAGE[task].sentence for task in TASKS}


def test_stock_lerobot_reads_the_states_and_actions_that_were_simulated(stock, first_episode):
    for number in (0, len(first_episode.state) - 1):
        item = stock[number]
        np.testing.assert_array_equal(item["observation.state"], first_episode.state[number])
        np.testing.assert_array_equal(item["action"], first_episode.action[number])


def test_stock_lerobot_decodes_the_images_that_were_rendered(stock, first_episode):
    for number in range(len(first_episode.state)):
        for camera, film in first_episode.images.items():
            decoded = stock[number][f"observation.images.{camera}"].numpy().transpose(1, 2, 0)
            error = np.abs(decoded.astype(int) - film[number]).mean()
            assert error < 3, f"frame {number} of {camera}"  # a neighbouring frame is at 4 or more where the arm moves


def test_later_episodes_of_a_film_decode_to_their_own_frames(stock, collected):
    train = split_seeds("train", 3 * 4)
    with MetaWorldEnvironment(TASKS[1]) as env:
        episode = record_episode(env, train[2], config(collected))
    row = stock.meta.episodes[5]["dataset_from_index"]
    assert stock.meta.episodes[5]["length"] == len(episode.state)
    decoded = stock[row]["observation.images.gripperPOV"].numpy().transpose(1, 2, 0)
    assert np.abs(decoded.astype(int) - episode.images["gripperPOV"][0]).mean() < 3


def test_subtasks_are_those_of_the_expert_from_the_frame_where_they_begin(stock):
    rows = stock[stock.meta.episodes[3]["dataset_from_index"]]["language_persistent"]
    assert [row["style"] for row in rows] == ["subtask"] * len(rows)
    begins = [row["timestamp"] for row in rows]
    assert begins[0] == 0
    assert begins == sorted(set(begins))
    assert rows[0]["content"] == "move above the drawer handle"
    assert rows[-1]["content"] == "pull the drawer open"


def test_questions_come_in_pairs_and_boxes_lie_in_the_image(stock):
    events = stock[0]["language_events"]
    for user, assistant in zip(events[::2], events[1::2], strict=True):
        assert (user["role"], assistant["role"], user["style"]) == ("user", "assistant", "vqa")
        assert user["camera"] == assistant["camera"]
        assert user["camera"] in stock.meta.camera_keys
        if user["content"].startswith("detect"):
            top, left, bottom, right = map(int, re.findall(r"\d{4}", assistant["content"]))
            assert 0 <= top < bottom <= 1023
            assert 0 <= left < right <= 1023
    assert "detect the red ball" in {row["content"] for row in events}


def test_questions_are_asked_at_the_stride(stock):
    assert [bool(stock[number]["language_events"]) for number in range(4)] == [True, False, True, False]


def test_statistics_are_those_of_the_columns(collected):
    stats = json.loads((collected / "robot" / "meta" / "stats.json").read_text())
    for name in ("observation.state", "action"):
        values = columns(collected)[name]
        np.testing.assert_allclose(stats[name]["min"], values.min(0), atol=1e-6)
        np.testing.assert_allclose(stats[name]["max"], values.max(0), atol=1e-6)
        np.testing.assert_allclose(stats[name]["mean"], values.mean(0), atol=1e-5)
        # the square: LeRobot takes E[x²] − E[x]² in float32, and an opening near 1 hardly varies
        np.testing.assert_allclose(np.square(stats[name]["std"]), values.var(0), atol=1e-6)
    assert np.shape(stats["observation.images.topview"]["mean"]) == (3, 1, 1)


def test_pushes_leave_the_actions_the_experts():
    quiet, pushed = (config(Path("unused"), noise_share=share, action_repeat=5) for share in (0.0, 1.0))
    with MetaWorldEnvironment("drawer-open-v3", action_repeat=5) as env:
        seed = split_seeds("train", 1)[0]
        clean, noisy = record_episode(env, seed, quiet), record_episode(env, seed, pushed)
    frames = min(len(noisy.state), len(clean.state))
    assert not np.allclose(noisy.state[:frames], clean.state[:frames], atol=0.01)
    # what the arm did between two frames is not what the recorded action says, where it was pushed
    moved, told = np.diff(noisy.state[:, :2], axis=0), noisy.action[:-1, :2]
    assert np.corrcoef(moved.ravel(), told.ravel())[0, 1] < 0.9
    moved, told = np.diff(clean.state[:, :2], axis=0), clean.action[:-1, :2]
    assert np.corrcoef(moved.ravel(), told.ravel())[0, 1] > 0.9


def test_slips_let_go_of_a_thing_and_the_expert_takes_it_again():
    options = {"noise_share": 0.0, "action_repeat": 4}
    firm, slipping = (config(Path("unused"), slip_share=share, **options) for share in (0.0, 1.0))
    with MetaWorldEnvironment("bin-picking-v3", action_repeat=4) as env:
        seeds = split_seeds("train", 2)
        firmly, slipped = ([record_episode(env, seed, of) for seed in seeds] for of in (firm, slipping))
    lifts = [
        [sum(now == "lift the cube" != before for before, now in pairwise(episode.subtasks)) for episode in episodes]
        for episodes in (firmly, slipped)
    ]
    assert max(lifts[0]) <= 2 < min(lifts[1])


class Wrist(MetaWorld):
    action_names = (*MetaWorld.action_names, "turn")


class WristEnvironment(MetaWorldEnvironment):
    """Takes a fifth number too, which moves nothing."""

    def expert_action(self) -> np.ndarray:
        return np.append(super().expert_action(), np.float32(0.25))

    def control_step(self, action: np.ndarray) -> bool:
        self.taken.append(action)
        return super().control_step(action[:4])


def test_slips_change_the_fingers_alone_of_an_action_of_more_dims():
    with WristEnvironment("button-press-topdown-v3") as env:
        env.taken = []
        record_episode(env, split_seeds("train", 1)[0], config(Path("unused"), env=Wrist(), slip_share=1.0))
    taken = np.stack(env.taken)
    assert {*taken[:, 4]} == {0.25}
    assert {*taken[:, 3]} == {-1.0, 1.0}


class NoFingers(MetaWorld):
    action_names = ("dx", "dy", "dz")


def test_slips_need_fingers():
    with pytest.raises(ValueError, match=r"slip_share: the 3 dims of an action \(dx, dy, dz\) close no fingers"):
        config(Path("unused"), env=NoFingers(), slip_share=0.5)


def test_held_actions_of_an_episode_bring_the_same_success():
    with MetaWorldEnvironment("drawer-open-v3") as env:
        seed = split_seeds("val", 1)[0]
        episode = record_episode(env, seed, config(Path("unused"), noise_share=0.0))
        env.reset(seed)
        assert any([env.step(action) for action in episode.action])  # noqa: C419 - every step is taken


@pytest.mark.slow
def test_number_of_processes_changes_no_byte_of_states_and_actions(collected, tmp_path):
    again = collect(config(tmp_path / "data", num_workers=2))
    for name, values in columns(collected).items():
        np.testing.assert_array_equal(columns(again)[name], values)


def test_another_seed_gives_other_initial_states():
    with MetaWorldEnvironment(TASKS[1]) as env:
        there = []
        for base in (0, 1):
            env.reset(split_seeds("train", 1, base)[0])
            there.append(env.positions()["drawer"])
    assert not np.allclose(*there)


def test_single_frames_have_captions_and_as_many_answers_as_questions(collected):
    web = datasets.load_from_disk(collected / "web")
    most = {"train": 2 * 2 * 4, "val": 2 * 1 * 4}  # what shows nothing is left out
    assert all(most[split] / 2 < len(rows) <= most[split] for split, rows in web.items())
    for row in web["train"]:
        assert row["image"].size == (64, 64)
        assert row["caption"] is None or row["caption"].startswith("a robot arm over a table")
        assert len(row["question"]) == len(row["answer"])
        assert row["caption"] or row["question"]
        for question, answer in zip(row["question"], row["answer"], strict=True):
            assert bool(BOX.fullmatch(answer)) == question.startswith("detect")


@pytest.mark.parametrize(
    ("offset", "said"),
    [
        ((0.2, 0.06, -0.05), "right, ahead, below"),
        ((0.0, -0.009, 0.0), "at the gripper"),
        ((0.2, 0.04, -0.1), None),  # about level with it
        ((-0.2, -0.06), "left, behind"),  # as seen from above
        ((0.2, 0.005), None),
        ((0.0, 0.005), None),  # it may be far below
    ],
)
def test_a_place_is_told_where_a_centimetre_does_not_change_it(offset, said):
    assert questions.direction(np.array(offset)) == said


def test_a_caption_tells_places_that_are_clear():
    clear, border = (0.1, 0.4, 0.2, 0.5), (0.1, 0.3, 0.2, 0.38)  # (ymin, xmin, ymax, xmax)
    told = questions.caption({"gripper": border, "drawer": clear})
    assert told == "a robot arm over a table, a drawer at the top centre"
    assert questions.caption({"drawer": clear, "window": border}) is None
    assert questions.caption({"drawer": (0.0, *clear[1:])}) is None
    assert questions.caption({"gripper": clear}) is None


def test_from_above_neither_heights_nor_fingers_are_asked_about(collected):
    web = datasets.load_from_disk(collected / "web")
    asked = [
        (row["camera"], *pair)
        for rows in web.values()
        for row in rows
        for pair in zip(row["question"], row["answer"], strict=True)
    ]
    assert {camera for camera, question, _ in asked if question == "is the gripper closed?"} == {"gripperPOV"}
    places = [answer for camera, question, answer in asked if camera == "topview" and question.startswith("where is")]
    assert places
    assert not any("above" in answer or "below" in answer for answer in places)


def test_nothing_is_asked_about_what_is_not_seen(collected):
    web = datasets.load_from_disk(collected / "web")["train"]
    for row in web:
        asked = [*zip(row["question"], row["answer"], strict=True)]
        seen = {question.removeprefix("detect the ") for question, _ in asked if question.startswith("detect")}
        assert {q.removeprefix("where is the ").rstrip("?") for q, _ in asked if q.startswith("where is")} <= seen


def test_existing_directory_is_left_alone(collected):
    before = sorted(collected.rglob("*"))
    with pytest.raises(FileExistsError, match="overwrite: true"):
        collect(config(collected))
    assert sorted(collected.rglob("*")) == before


def test_directory_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not a dataset of pi05 collect"):
        collect(config(tmp_path, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_expert_that_fails_too_often_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expert of reach-v3 solved 0 of 4 .*max_frames"):
        collect(config(tmp_path / "data", tasks=("reach-v3",), episodes=1, val_episodes=0, scenes=0, max_frames=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("action_repeat", 7), ("action_repeat", 0), ("answers_every", 0), ("seed", -1)]
)
def test_numbers_that_cannot_be_are_rejected(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}(:| is) {value}"):
        config(tmp_path, **{name: value})


class Slow(MetaWorld):
    control_hz = 20


def test_rate_of_an_action_that_cannot_be_is_answered_with_those_that_can():
    with pytest.raises(ValueError, match=r"8 does not divide 20 Hz; use one of 1, 2, 4, 5, 10, 20$"):
        config(Path("unused"), env=Slow())


def content(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file() and file.name != "state.json")  # a random fingerprint
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


PROGRAM = """
from pathlib import Path
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.demonstrations.config import CollectConfig
if __name__ == "__main__":
    collect(CollectConfig(Path({out!r}), tasks=("reach-v3",), episodes=30, val_episodes=2, scenes=30, num_workers=1,
                          overwrite=True))
"""


def test_two_collects_do_not_make_one_dataset(tmp_path):
    held_by_another = held(tmp_path / ".data.partial", "x")
    with held_by_another, pytest.raises(ValueError, match=r"another pi05 collect writes to .*data"):
        collect(config(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tasks": ("reach-v3", "reach-v3")}, "tasks: reach-v3 is named twice"), ({"num_workers": 0}, "num_workers is 0")],
)
def test_what_would_be_made_twice_or_by_nobody_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(Path("unused"), **options)


@pytest.mark.parametrize(
    "spelled", [{"tasks": MetaWorld.demonstrated}, {"cameras": MetaWorld.cameras}, {"max_frames": 60}, {"tasks": TASKS}]
)
def test_collect_goes_on_with_what_is_the_same_however_it_is_spelled(tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    found = interrupted_by(monkeypatch, lerobot_writer)
    for options in ({"out": tmp_path / "data"}, {"out": Path("data"), **spelled}):
        with pytest.raises(KeyboardInterrupt):
            collect(CollectConfig(**options, num_workers=1))
    assert found == [[], [] if spelled == {"tasks": TASKS} else ["episodes-0.pickle"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "pattern"),
    [(signal.SIGINT, "episodes-1.pickle"), (signal.SIGKILL, "episodes-0.pickle"), (signal.SIGKILL, "scenes-0.pickle")],
)
def test_interrupted_collect_leaves_the_old_dataset_whole_and_goes_on(tmp_path, how, pattern):
    out = tmp_path / "data"
    old = out / "robot" / "meta" / "info.json"
    old.parent.mkdir(parents=True)
    old.touch()
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(out=str(out)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, start_new_session=True)
    kept = tmp_path / ".data.partial" / ".kept"
    while not list(kept.glob(pattern)):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)
    process.send_signal(how)
    process.communicate(timeout=60)  # returns when the workers, who share its stderr, have ended too
    assert old.exists()
    kept_films = len(list(kept.glob("episodes-*.pickle")))
    assert kept_films
    films = sorted(kept.parent.rglob("*.mp4"))[:kept_films]  # of one camera
    made = [film.stat().st_mtime_ns for film in films]
    options = {"tasks": ("reach-v3",), "episodes": 30, "val_episodes": 2, "scenes": 30}
    collect(CollectConfig(out, **options, overwrite=True))
    collect(CollectConfig(tmp_path / "whole" / "data", **options))
    assert not kept.parent.exists()
    assert [film.stat().st_mtime_ns for film in sorted(out.rglob("*.mp4"))[:kept_films]] == made
    assert content(out) == content(tmp_path / "whole" / "data")
