"""Does a policy follow its instruction? What it is told in a rollout, and success at its task and at the one told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pi05_lightning.cli.rollout import rollout
from pi05_lightning.evaluation.report.page import render
from pi05_lightning.evaluation.report.run import read_run
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import View, act_as_expert
from pi05_lightning.sim.instructions import (
    PARAPHRASES,
    check_unheard,
    paraphrase,
    read_paraphrases,
    swapped_tasks,
)
from pi05_lightning.sim.metaworld.tasks import LANGUAGE
from pi05_lightning.sim.motion import run_policy
from pi05_lightning.sim.rollout import Job, Lanes, Plan, run_policy_job
from pi05_lightning.sim.simulators import MetaWorld
from pi05_lightning.sim.summary import summarise
from pi05_lightning.sim.trials import SOLVED_OTHER, Clock, Result, Trial
from tests.sim.walk import Stub, Walk, chunk, result_of

VIEW = View(("topview",), 64, 10.0)


class Shared(Walk):
    """A scene in which `back` is solved at -0.5."""

    solved_other = False

    def watch(self, task: str) -> bool:
        return task == "back"

    def step(self, action: np.ndarray) -> bool:
        solved = super().step(action)
        self.solved_other = self.at <= -0.5
        return solved


class Heard(Stub):
    """Goes forward unless it is told to go back; remembers what it was told."""

    hierarchical = False

    def __init__(self) -> None:
        super().__init__(None)
        self.told: set[str] = set()

    def predict_chunks(self, frames, subtasks, noise, prefix_actions=None, generator=None):
        self.told |= {frame.task for frame in frames}
        return [chunk(-0.25 if frame.task == "go back" else 0.25) for frame in frames]


def outcome(env: Walk, other: str, sentence: str) -> tuple[Result, set[str]]:
    policy, trial = Heard(), Trial("policy", "walk", 0, instruction="swapped", other=other)
    return result_of(policy, env, trial, sentence), policy.told


def test_policy_that_follows_another_tasks_instruction_succeeds_at_that_one():
    result, told = outcome(Shared(), other="back", sentence="go back")
    assert told == {"go back"}
    assert (result.success, result.solved_other, result.reason) == (False, True, SOLVED_OTHER)


def test_policy_that_does_not_succeeds_at_the_scenes_own():
    result, _ = outcome(Shared(), other="back", sentence="turn around")
    assert (result.success, result.solved_other, result.reason) == (True, False, "")


@pytest.mark.parametrize(("env", "other"), [(Walk(), "back"), (Shared(), "jump")])
def test_scene_that_does_not_allow_the_other_task_tells_nothing_of_it(env, other):
    result, _ = outcome(env, other=other, sentence="go back")
    assert (result.success, result.solved_other) == (False, None)


def test_summary_counts_at_the_right_task_and_at_the_one_told():
    told = {"mode": "policy", "instruction": "swapped"}
    a, c = Trial(task="a", seed=0, other="b", **told), Trial(task="c", seed=0, other="a", **told)
    results = [Result(a, solved_other=i < 3, success=i == 3) for i in range(5)]
    results += [Result(c, success=i < 2) for i in range(5)]
    result = summarise([*results, Result(Trial("policy", "a", 0), success=True)], {})
    assert result["success"] == {"policy, swapped": {"a": [1, 5], "c": [2, 5]}, "policy": {"a": [1, 1]}}
    assert result["swapped"] == {
        "policy, swapped": {"a": {"told": "b", "success": [3, 5]}, "c": {"told": "a", "success": None}}
    }


def test_every_policy_mode_is_told_everything_and_baselines_nothing():
    instructions, swaps = ("right", "swapped", "paraphrased", "empty"), {"a": "b"}
    plan = Plan(MetaWorld(), ["a"], ("policy", "flat", "random"), 2, instructions=instructions, swaps=swaps)
    trials = {job.trials[0].column: job.trials for job in plan.jobs()}
    columns = [mode if kind == "right" else f"{mode}, {kind}" for mode in ("policy", "flat") for kind in instructions]
    assert list(trials) == [*columns, "random"]
    assert {trial.seed for job in trials.values() for trial in job} == {trial.seed for trial in trials["random"]}
    assert {trial.other for trial in trials["flat, swapped"]} == {"b"}


class OneWalk(Lanes):
    """A task of one environment, and what another task is told."""

    def __init__(self) -> None: ...

    def of(self, task, count, max_seconds=None):
        return [Walk()]

    def sentence_of(self, task):
        return {"back": "go back"}[task]


@pytest.mark.parametrize(
    ("kind", "told"),
    [("right", "reach one"), ("swapped", "go back"), ("paraphrased", "get to one"), ("empty", "")],
)
def test_policy_is_told_what_the_kind_of_instruction_says(kind, told):
    policy, job = Heard(), Job((Trial("policy", "walk", 0, instruction=kind, other="back"),))
    policy.inputs = SimpleNamespace()
    run_policy_job(job, policy, OneWalk(), {"reach one": ["get to one"]})
    assert policy.told == {told}


def test_other_task_is_one_of_the_scene_or_the_next():
    tasks = ["faucet-close-v3", "reach-v3", "faucet-open-v3"]
    partners = MetaWorld().partners(tasks)
    assert swapped_tasks(tasks, {}, partners) == {
        "faucet-close-v3": "faucet-open-v3",
        "reach-v3": "faucet-open-v3",
        "faucet-open-v3": "faucet-close-v3",
    }
    assert swapped_tasks(tasks, {"reach-v3": "push-v3"}, partners)["reach-v3"] == "push-v3"
    assert MetaWorld().partners(["drawer-open-v3"]) == {"drawer-open-v3": "drawer-close-v3"}
    with pytest.raises(ValueError, match="no other instruction than that of reach-v3: name a task"):
        swapped_tasks(["reach-v3"], {}, {})
    with pytest.raises(ValueError, match="swaps: push-v3 is not run"):
        swapped_tasks(tasks, {"push-v3": "reach-v3"}, {})


def test_other_task_has_another_instruction():
    said = {"push-v3": "push it", "push-back-v3": "push it", "reach-v3": "reach it"}
    assert swapped_tasks([*said], {}, {}, said.get) == {
        "push-v3": "reach-v3",
        "push-back-v3": "reach-v3",
        "reach-v3": "push-v3",
    }
    with pytest.raises(ValueError, match="no other instruction than that of push-v3"):
        swapped_tasks([*said], {"push-v3": "push-back-v3"}, {}, said.get)


@pytest.mark.parametrize(
    ("task", "other"),
    [
        ("faucet-close-v3", "faucet-open-v3"),
        pytest.param("drawer-close-v3", "drawer-open-v3", marks=pytest.mark.slow),
    ],
)
def test_metaworld_judges_the_other_task_of_a_scene_as_its_own_environment_does(task, other):
    """The other task's expert solves it in this task's scene, and this task's expert does not."""
    with MetaWorld().open(task, VIEW) as env, MetaWorld().open(other, VIEW) as theirs:
        for policy, expected in ((theirs._policy, True), (env._policy, False)):
            env.reset(3)
            assert env.watch(other)
            for _ in range(500):
                policy_view = env._other._get_obs()
                env.control_step(np.clip(policy.get_action(policy_view if expected else env._obs), -1, 1))
                if env.solved_other:
                    break
            assert env.solved_other is expected


@pytest.mark.parametrize(
    ("task", "other"),
    [
        ("drawer-open-v3", "drawer-close-v3"),
        ("reach-v3", "push-v3"),
        ("faucet-close-v3", "drawer-open-v3"),
        ("coffee-push-v3", "coffee-pull-v3"),  # their goals are drawn: with ours, both would be one task
        ("plate-slide-v3", "plate-slide-back-v3"),
    ],
)
def test_what_is_solved_already_or_not_there_is_not_watched(task, other):
    with MetaWorld().open(task, VIEW) as env:
        env.reset(0)
        assert not env.watch(other)
        env.step(np.zeros(4, np.float32))
        assert not env.solved_other


def test_what_is_solved_already_is_no_instruction_and_what_is_not_is_one():
    with MetaWorld().open("drawer-open-v3", VIEW) as env:
        env.reset(0)
        assert not env.instruct("drawer-close-v3")
        assert env.sentence == "open the drawer"
        while not act_as_expert(env):
            pass
        assert env.instruct("drawer-close-v3")
        assert not env.step(np.zeros(4, np.float32))
        assert env.instruct("drawer-open-v3")


def test_watching_another_task_changes_nothing_of_the_own():
    states = []
    with MetaWorld().open("faucet-close-v3", VIEW) as env:
        for watched in (False, True):
            env.reset(1)
            if watched:
                env.watch("faucet-open-v3")
            for _ in range(20):
                act_as_expert(env)
            states.append(env._obs)
    np.testing.assert_array_equal(*states)


# --- other words


def test_shipped_paraphrases_are_of_metaworlds_instructions_and_none_is_one():
    found = read_paraphrases(PARAPHRASES)
    # those of no more words than the task's name are not among them
    names = {task.removesuffix("-v3").replace("-", " ") for task in LANGUAGE}
    assert found.keys() >= {language.sentence for language in LANGUAGE.values()} - names
    assert not set(found) & {words for others in found.values() for words in others}


def test_paraphrases_take_turns_and_a_sentence_without_any_is_named(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("open it: [do open it, opening is the task]\n")
    found = read_paraphrases(file)
    assert [paraphrase(found, "open it", i) for i in range(3)] == ["do open it", "opening is the task", "do open it"]
    with pytest.raises(ValueError, match=r"'close it' in no other words.* --paraphrases"):
        paraphrase(found, "close it", 0)


def test_words_that_were_trained_on_are_no_paraphrase():
    words = {"open it": ["do open it", "opening_is the task"]}
    check_unheard(words, ["open it"], PARAPHRASES)
    with pytest.raises(ValueError, match="open it: the policy was trained on 'opening_is the task'"):
        check_unheard(words, ["opening is the task"], PARAPHRASES)


@pytest.mark.parametrize("text", ["open it: do\n", "open it: []\n", "- open it\n", "open it: [1]\n"])
def test_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "words.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"words.yaml, .*expected an instruction and a list"):
        read_paraphrases(tmp_path / "words.yaml")
    with pytest.raises(ValueError, match="no file"):
        read_paraphrases(tmp_path / "none.yaml")


@pytest.mark.slow
def test_rollout_tells_the_policy_every_kind_of_instruction(untrained, tmp_path, capsys):
    """The policy knows two tasks; an instruction that it was never trained on, or none, ends no episode."""
    out = tmp_path / "rollout"
    options = {"episodes": 1, "max_seconds": 0.2, "num_workers": 1, "out": out, "modes": ("policy", "random")}
    instructions = ("right", "swapped", "paraphrased", "empty")
    tasks = ["reach-v3", "drawer-open-v3"]
    found = rollout(untrained, tasks, instructions=instructions, **options)
    columns = ["policy", *(f"policy, {kind}" for kind in instructions[1:]), "random"]
    assert found["success"].keys() == {*columns}
    assert found["crashed"] == []
    assert found["swapped"]["policy, swapped"]["reach-v3"] == {"told": "drawer-open-v3", "success": None}
    assert (out / "policy-swapped-reach-v3-2000000.mp4").is_file()
    assert "told another task's instruction" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    page = render(read_run(tmp_path), {})
    assert "<th>policy, subtask first, paraphrased</th>" in page
    assert "<td>drawer-open-v3</td><td>0 / 1</td><td>not judged in this scene</td>" in page


@pytest.mark.slow
def test_instruction_without_other_words_is_named_by_the_rollout(untrained, tmp_path):
    (tmp_path / "words.yaml").write_text("open the drawer: [pull it]\n")
    told = {"instructions": ("paraphrased",), "paraphrases": tmp_path / "words.yaml"}
    with pytest.raises(ValueError, match="'reach the red ball' in no other words"):
        rollout(untrained, ["reach-v3"], episodes=1, modes=("policy",), num_workers=1, out=tmp_path, **told)


class Chain(Walk):
    """Another instruction from 0.4 on."""

    @property
    def sentence(self) -> str:
        return "go to 0.4" if self.at < 0.4 else "reach one"


class Sayer(Stub):
    """Says the instruction as its subtask, and goes on by 0.1; `heard` are the two before each chunk."""

    def __init__(self, **acting) -> None:
        super().__init__(None, **acting)
        self.heard: list[tuple[str, str]] = []
        self.prefixes: list[list[int]] = []

    def predict_subtasks(self, frames, generator=None):
        return [f"do: {frame.task}" for frame in frames]

    def predict_chunks(self, frames, subtasks, noise, prefix_actions=None, generator=None):
        self.heard += [(frame.task, subtask) for frame, subtask in zip(frames, subtasks, strict=True)]
        self.prefixes += [[len(prefix) for prefix in prefix_actions or ()]]
        return [chunk(0.1) for _ in frames]


@pytest.mark.parametrize("delay", [0, 1])
def test_policy_begins_anew_at_the_next_instruction_of_a_chain(delay):
    policy = Sayer(execution_horizon=3, replan_subtask_every=3, inference_delay=delay)
    assert result_of(policy, Chain(), Trial("policy", "x", 0)).success
    first, second = ("go to 0.4", "do: go to 0.4"), ("reach one", "do: reach one")
    assert policy.heard == [first, first, second, second]  # 3 + 1 actions, of which the last ends it; then 3 + 3
    assert policy.prefixes == [[], [1], [], [1]] if delay else [[]] * 4


def test_next_instruction_of_one_lane_changes_nothing_in_another():
    policy = Sayer(execution_horizon=3, inference_delay=1)
    courses = [Course(Chain(), Trial("policy", "x", 0)), Course(Walk(), Trial("policy", "y", 0))]
    run_policy(policy, courses, Clock())
    assert all(course.result.success for course in courses)
    assert policy.prefixes[:3] == [[], [1, 1], [0, 1]]
