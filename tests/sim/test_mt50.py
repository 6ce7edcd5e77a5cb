"""MT50 is LeRobot's: sentences, groups, the camera's image, state, initial states; and what our table adds to it."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from pi05_lightning.cli.main import main
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.environment import View
from pi05_lightning.sim.metaworld.environment import metaworld_seed, task_names
from pi05_lightning.sim.metaworld.tasks import LANGUAGE
from pi05_lightning.sim.simulators import MT50, LeRobotEnv
from pi05_lightning.sim.splits import split_seeds
from pi05_lightning.sim.summary import by_group, groups_table
from tests.untrained import untrained_policy

from .conftest import config

QUICK = ("peg-insert-side-v3",)
ALL_TASKS = [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in MT50.demonstrated]
HIDDEN = {
    "coffee-pull-v3": "green ball",  # smaller than four pixels
    "hand-insert-v3": "blue ball",  # in the hole
    "plate-slide-back-v3": "red ball",  # behind the hand
    "plate-slide-back-side-v3": "red ball",  # the same
    "push-wall-v3": "green ball",  # behind the wall
    "shelf-place-v3": "green ball",  # behind the shelf's side
    "soccer-v3": "green ball",  # behind the ball or a post
}
"""task -> the object that the camera may not see at the beginning."""


def opened(task: str):
    return MT50().open(task, View(("corner2",), 96, 80.0))


def test_sentences_and_groups_are_lerobots():
    theirs = json.loads(files("lerobot").joinpath("envs", "metaworld_config.json").read_text())
    env = MT50()
    assert {task: env.sentences(task)[0] for task in task_names()} == theirs["TASK_DESCRIPTIONS"]
    assert {group: list(tasks) for group, tasks in env.groups().items()} == theirs["DIFFICULTY_TO_TASKS"]
    assert sorted(env.demonstrated) == task_names()


@pytest.mark.slow
@pytest.mark.parametrize("task", ALL_TASKS)
def test_image_and_state_are_those_of_lerobots_environment(task):
    """LeRobot draws 480 pixels, with shadows, reflections and multisampling; a policy of 96 pixels sees every fifth."""
    seed, action = split_seeds("rollout", 1)[0], np.array([0.5, 0.3, -0.2, 1.0], np.float32)
    theirs, _ = LeRobotEnv("metaworld").make(task)
    first, _ = theirs.reset(seed=metaworld_seed(task, seed))  # all of it first: its renderer expects to be the only one
    *_, later = [theirs.step(action)[0] for _ in range(20)]
    sentence = theirs.unwrapped.task_description
    theirs.close()
    with opened(task) as ours:
        assert ours.sentence == sentence
        ours.reset(seed)
        for seen in (first, later):
            np.testing.assert_allclose(ours.state, seen["agent_pos"], atol=1e-6)
            image = ours.render()["corner2"].transpose(1, 2, 0).astype(int)
            reference = seen["pixels"][2::5, 2::5]
            assert np.abs(image - reference).mean() < 15
            for turned in (image[::-1], image[:, ::-1], image[::-1, ::-1]):
                assert np.abs(turned - reference).mean() > 25
            for _ in range(20):
                ours.control_step(action)


def test_episode_has_400_control_steps_and_a_policy_is_run_on_what_it_was_trained_on():
    with MT50().open("push-v3", View(("corner2",), 64, 10.0)) as env:
        assert (env.action_repeat, env.max_seconds * 80) == (8, 400)
    trained = SimpleNamespace(tasks=["Push the puck to a goal", "Open a drawer"])
    assert MT50().tasks(trained) == ["drawer-open-v3", "push-v3", "push-back-v3"]
    assert len(MT50().tasks(SimpleNamespace(tasks=["open the drawer"]))) == 50


@pytest.mark.parametrize("task", ALL_TASKS)
def test_camera_sees_the_objects_and_the_expert_goes_through_phases(task):
    with opened(task) as env:
        for seed in split_seeds("val", 3):
            env.reset(seed)
            assert {*env.objects, "gripper"} - {*env.boxes()["corner2"]} <= {HIDDEN.get(task)}
        phases, solved = [], False
        while not solved and len(phases) < 400:
            phases.append(env.subtask())
            solved = env.control_step(env.expert_action())
    assert solved
    assert any(earlier != later for earlier, later in pairwise(phases))


@pytest.mark.parametrize(
    ("env", "task", "sentences"),
    [
        (LeRobotEnv("metaworld"), "drawer-open-v3", ("Open a drawer",)),
        (LeRobotEnv("metaworld", {"task": "reach-v3"}), "reach-v3", ("Reach a goal position",)),
        (LeRobotEnv("metaworld", sentence="open it"), "drawer-open-v3", ("open it",)),
        (LeRobotEnv("pusht", sentence="push the T"), "PushT-v0", ("push the T",)),
        (LeRobotEnv("metaworld"), "easy/3", ()),
        (LeRobotEnv("aloha"), "AlohaInsertion-v0", ()),
    ],
)
def test_lerobots_environment_says_what_its_tasks_are_told(
    env: LeRobotEnv, task: str, sentences: tuple[str, ...]
) -> None:
    assert env.sentences(task) == sentences


def test_every_task_has_objects():
    assert sorted(LANGUAGE) == task_names()
    assert all(language.objects for language in LANGUAGE.values())


def test_summary_has_the_mean_of_each_group_and_of_the_groups():
    groups = {"easy": ["a", "b", "c"], "hard": ["d"]}
    success = {"policy": {"a": [4, 4], "b": [1, 4], "d": [1, 4]}, "random": {"a": [1, 4], "b": [0, 4], "d": [0, 4]}}
    found = by_group(success, groups)
    assert found["groups"]["policy"] == {
        "easy": {"success": [5, 8], "tasks": 2},
        "hard": {"success": [1, 4], "tasks": 1},
    }
    assert found["macro"] == {"policy": 0.4375, "random": 0.0625}  # (5/8 + 1/4) / 2 and (1/8 + 0) / 2
    file = io.StringIO()
    Console(file=file, width=80).print(groups_table(found["groups"], found["macro"], success))
    assert [line.split() for line in file.getvalue().splitlines() if "mean" in line][-2:] == [
        ["mean", "of", "the", "groups", "0.44", "0.06"],
        ["mean", "over", "episodes", "0.50", "0.08"],
    ]


def test_mean_of_the_groups_needs_all_of_them():
    found = by_group({"policy": {"a": [1, 2]}}, {"easy": ["a"], "hard": ["d"]})
    assert found["macro"] == {"policy": None}
    assert by_group({"policy": {"a": [1, 2]}}, {}) == {}


@pytest.mark.slow
def test_tasks_are_collected_and_rolled_out_with_the_mean_of_each_group(tmp_path):
    tasks = ("drawer-open-v3", "soccer-v3", "push-v3", "stick-push-v3")
    small = {"tasks": tasks, "episodes": 1, "scenes": 1, "image_size": 96}
    data = collect(config(tmp_path / "data", env=MT50(), **small))
    policy = untrained_policy(tmp_path / "policy", data / "robot")
    how = ["--env", "MT50", "--episodes", "1", "--modes", "[policy,expert]", "--videos", "0", "--num_workers", "1"]
    main(["rollout", str(policy), "--out", str(tmp_path), *how])
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert set(result["success"]["policy"]) == {*tasks, "push-back-v3"}  # which shares push's instruction
    assert set(result["max_seconds"].values()) == {5.0}
    assert {group: found["tasks"] for group, found in result["groups"]["policy"].items()} == {
        "easy": 1,
        "medium": 1,
        "hard": 2,
        "very_hard": 1,
    }
    assert result["macro"]["expert"] > 0.5
