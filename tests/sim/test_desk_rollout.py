"""From the desk's experts to a dataset, and from there to a rollout that tells whether a policy listens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi05_lightning.cli.rollout import rollout
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.evaluation.report.page import render
from pi05_lightning.evaluation.report.run import read_run
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.sim.baselines import run_baseline
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.desk.environment import Desk
from pi05_lightning.sim.desk.tasks import CHAIN, INSTRUCTIONS
from pi05_lightning.sim.rollout import Plan
from pi05_lightning.sim.summary import summarise
from pi05_lightning.sim.trials import Clock, Result, Trial
from tests.sim.conftest import config
from tests.sim.walk import Walk
from tests.untrained import untrained_policy

NAMES = ("button-red", "drawer-open")
SENTENCES = [INSTRUCTIONS[name].sentence for name in NAMES]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    few = {"episodes": 2, "val_episodes": 1, "scenes": 1}
    return collect(config(tmp_path_factory.mktemp("desk") / "data", env=Desk(), tasks=NAMES, **few)) / "robot"


@pytest.fixture(scope="module")
def policy(recorded, tmp_path_factory) -> Path:
    return untrained_policy(tmp_path_factory.mktemp("policy"), recorded)


@pytest.mark.slow
def test_our_data_module_reads_the_instructions_subtasks_and_boxes_of_both_cameras(recorded):
    source = LeRobotConfig(str(recorded)).open("robot", "train", ModelConfig.preset("debug").shapes)
    robot = source.robot()
    assert sorted(robot.tasks) == sorted(SENTENCES)
    assert robot.cameras == Desk.cameras
    first = source[0]
    assert first.task == SENTENCES[0]
    assert (first.subtask or "").startswith("move above the red button at the ")
    assert {"detect the green block", "is the drawer open?"} <= {answer.question for answer in first.answers}


@pytest.mark.slow
def test_rollout_judges_the_task_told(policy, tmp_path):
    options = {"episodes": 1, "max_seconds": 0.2, "num_workers": 1, "videos": 0, "out": tmp_path}
    found = rollout(policy, env=Desk(), modes=("policy",), instructions=("swapped", "paraphrased", "empty"), **options)
    assert found["swapped"]["policy, swapped"] == {
        "button-red": {"told": "drawer-open", "success": [0, 1]},
        "drawer-open": {"told": "button-red", "success": [0, 1]},
    }
    assert found["success"]["policy, paraphrased"].keys() == found["success"]["policy, empty"].keys() == {*NAMES}
    assert found["crashed"] == []


@pytest.mark.slow
def test_rollout_takes_a_chain(policy, tmp_path):
    options = {"episodes": 1, "max_seconds": 0.1, "num_workers": 1, "videos": 0, "out": tmp_path}
    found = rollout(policy, [CHAIN], Desk(), modes=("policy",), **options)
    assert found["chains"]["policy"]["chain"]["mean"] == 0


def test_chain_is_told_the_right_instructions_alone():
    with pytest.raises(ValueError, match="instructions: chain gives its own, one after the other: run it by itself"):
        Plan(Desk(), ["drawer-open", CHAIN], ("policy",), 1, instructions=("right", "empty"))


@pytest.mark.slow
def test_a_task_without_demonstrations_leaves_their_replay_out(policy, recorded, tmp_path, caplog):
    options = {"episodes": 1, "max_seconds": 0.1, "num_workers": 1, "videos": 0, "out": tmp_path, "dataset": recorded}
    tasks = ["tidy-up", "button-red"]
    with pytest.raises(ValueError, match=r"mode mean_replay: .* has no demonstration of tidy-up"):
        rollout(policy, tasks, Desk(), modes=("mean_replay", "random"), **options)
    found = rollout(policy, tasks, Desk(), **options)
    assert found["success"].keys() >= {"policy", "random", "expert"}
    assert "mean_replay" not in found["success"]
    assert "the mode mean_replay is left out" in caplog.text


@pytest.mark.slow
def test_rollout_counts_what_was_done_in_a_row(policy, tmp_path, capsys):
    out = tmp_path / "rollout"
    found = rollout(policy, [CHAIN], Desk(), episodes=2, modes=("policy", "expert"), num_workers=1, out=out)
    assert found["chains"] == {
        "policy": {CHAIN: {"episodes": 2, "in_a_row": [0] * 5, "mean": 0.0}},
        "expert": {CHAIN: {"episodes": 2, "in_a_row": [2] * 5, "mean": 5.0}},
    }
    assert found["success"]["expert"] == {CHAIN: [2, 2]}
    assert "instructions done in a row" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    assert "<h3>Instructions done in a row</h3>" in render(read_run(tmp_path), {})


def test_summary_counts_instructions_in_a_row():
    results = [Result(Trial("policy", CHAIN, seed), done=done, length=5) for seed, done in enumerate((0, 2, 5, 5))]
    assert summarise(results, {})["chains"] == {
        "policy": {CHAIN: {"episodes": 4, "in_a_row": [3, 3, 2, 2, 2], "mean": 3.0}}
    }


class TwoWalks(Walk):
    """To one, and then to two."""

    done, length, sentence = 0, 2, "reach one"

    def step(self, action: np.ndarray) -> bool:
        self.done = int(super().step(action)) + int(self.at >= 2)
        self.sentence = ("reach one", "reach two", "")[self.done]
        return self.done == 2


def test_mean_trajectory_begins_anew_with_each_instruction_of_a_chain():
    ways = {"reach one": np.array([[0.5], [0.5], [0.0]]), "reach two": np.array([[0.25], [0.75], [0.0]])}
    course = Course(TwoWalks(), Trial("mean_replay", "walk", 0))
    run_baseline(course, Clock(), ways.__getitem__)
    result = course.result
    assert (result.success, result.done, result.length, result.decisions) == (True, 2, 2, 4)


@pytest.mark.slow
def test_share_of_the_episodes_begins_where_others_ended(recorded, tmp_path):
    few = {"episodes": 4, "val_episodes": 0, "scenes": 0, "continued_share": 0.5}
    data = collect(config(tmp_path / "data", env=Desk(), tasks=NAMES[:1], **few)) / "robot"

    def starts(path: Path) -> np.ndarray:
        source = LeRobotConfig(str(path)).open("robot", "train", ModelConfig.preset("debug").shapes)
        return np.stack([source[row].state for row in range(len(source)) if source.place(row)["frame_index"] == 0])

    usual = starts(recorded)[0]
    apart = np.abs(starts(data)[:, :3] - usual[:3]).max(1)
    assert (apart < 0.005).any()
    assert (apart > 0.02).any()


def test_tasks_without_a_common_scene_cannot_continue(tmp_path):
    with pytest.raises(ValueError, match=r"continued_share: drawer-open-v3 does not share its scene"):
        collect(config(tmp_path / "data", tasks=("drawer-open-v3",), episodes=1, scenes=0, continued_share=0.5))


def test_the_same_states_are_not_continued_from_others(tmp_path):
    with pytest.raises(ValueError, match=r"continued_share: .* leave it 0 with --env.same_states true"):
        config(tmp_path, env=Desk(same_states=True), continued_share=0.5)
    assert config(tmp_path, env=Desk(), continued_share=0.5).continued_share == 0.5


@pytest.mark.slow
def test_instructions_may_be_recorded_in_other_words_and_in_the_same_states(tmp_path):
    few = {"episodes": 6, "val_episodes": 1, "scenes": 0, "rephrased_share": 0.7}
    data = collect(config(tmp_path / "data", env=Desk(same_states=True), tasks=NAMES, **few)) / "robot"
    source = LeRobotConfig(str(data)).open("robot", "train", ModelConfig.preset("debug").shapes)
    robot = source.robot()
    known = {name: {INSTRUCTIONS[name].sentence, *INSTRUCTIONS[name].others} for name in NAMES}
    assert all(len(known[name] & {*robot.tasks}) > 1 for name in NAMES)
    assert {*robot.tasks} <= {words for ways in known.values() for words in ways}
    assert {*Desk().tasks(robot)} == {*NAMES}
    starts = [source[row] for row in range(len(source)) if source.place(row)["frame_index"] == 0]
    images = [frame.images["desk"].astype(int) for frame in starts]
    apart = [np.abs(image - images[0]).mean() for image in images]
    assert apart[6] < 2  # another instruction, films apart
    assert min(apart[1:6]) > 4
