"""`pi05 rollout`: real simulators, real processes, an untrained policy."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.evaluation.report.run import read_run
from pi05_lightning.sim.available_modes import available_modes
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import NoSuchEnvironment, View
from pi05_lightning.sim.glimpse import glimpse
from pi05_lightning.sim.lerobot_env import LeRobotEnvironment
from pi05_lightning.sim.motion import run_policy
from pi05_lightning.sim.rollout import Lanes, Plan, Worker, run_in_processes
from pi05_lightning.sim.simulators import LeRobotEnv, MetaWorld
from pi05_lightning.sim.trials import NOT_FINITE, OUT_OF_TIME, Clock, Trial
from pi05_lightning.types import Frame
from pi05_lightning.weights.locate import locate
from tests.sim.walk import Walk

VIEW = View(("topview", "gripperPOV"), 64, 10.0)


def copy_with_nan(source: Path, target: Path) -> Path:
    """The policy with a NaN in the last weights of its flow head."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if "action_out_proj" in name and name.endswith("bias"))
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def result(untrained, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("rollout")
    modes = ("policy", "flat", "random")
    return rollout(untrained, ["reach-v3"], episodes=2, modes=modes, out=out, max_seconds=0.3, num_workers=1), out


def test_rollout_counts_every_mode_and_task(result):
    assert {mode: counts["reach-v3"][1] for mode, counts in result[0]["success"].items()} == {
        "policy": 2,
        "flat": 2,
        "random": 2,
    }


def test_file_is_what_was_returned(result):
    assert json.loads((result[1] / "rollout.json").read_text()) == json.loads(json.dumps(result[0]))


def test_initial_states_of_collected_tasks_are_held_out(result):
    assert result[0]["held_out"]
    assert not LeRobotEnv(type="metaworld").held_out


def test_policy_is_named_by_its_weights(result, untrained):
    assert result[0]["sha256"] == locate(untrained).content_hash()


def test_policy_and_simulator_are_timed(result):
    times = result[0]["milliseconds"]
    assert set(times["policy"]) == {"decision", "step"}
    assert set(times["random"]) == {"step"}
    assert 0 < times["policy"]["decision"]["median"] <= times["policy"]["decision"]["p95"]


def test_first_episode_of_each_policy_mode_is_filmed(result):
    assert {file.name for file in result[1].glob("*.mp4")} == {
        "policy-reach-v3-2000000.mp4",
        "flat-reach-v3-2000000.mp4",
    }


@pytest.mark.slow
def test_second_rollout_takes_the_place_of_the_first_and_of_nothing_else(result, untrained, tmp_path):
    out = Path(shutil.copytree(result[1], tmp_path / "run" / "rollout"))
    (out / "mine.mp4").write_bytes(b"no film of a rollout")
    options = {"episodes": 1, "modes": ("flat",), "max_seconds": 0.2, "num_workers": 1}
    found = rollout(untrained, ["drawer-open-v3"], out=out, **options)
    assert list(found["films"]) == ["flat-drawer-open-v3-2000000.mp4"]
    assert {file.name for file in out.iterdir()} == {
        "rollout.json",
        "flat-drawer-open-v3-2000000.mp4",
        "flat-drawer-open-v3-2000000.png",
        "mine.mp4",
    }
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 0\n")
    assert [film.name for film in read_run(tmp_path / "run").videos] == list(found["films"])


def test_rollout_that_fails_leaves_the_one_before(result, untrained, tmp_path):
    out = Path(shutil.copytree(result[1], tmp_path / "rollout"))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match="no task 'reach-v2'"):
        rollout(
            untrained, ["reach-v3", "reach-v2"], episodes=1, modes=("flat",), out=out, max_seconds=0.1, num_workers=1
        )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.slow
def test_policy_that_gives_nan_is_in_the_table_and_the_run_goes_on(untrained, tmp_path, capsys):
    broken = copy_with_nan(untrained, tmp_path)
    found = rollout(broken, ["reach-v3"], episodes=2, modes=("flat", "random"), max_seconds=0.2, num_workers=1)
    assert found["failures"]["flat"] == {"reach-v3": {NOT_FINITE: 2}}
    assert found["failures"]["random"] == {"reach-v3": {OUT_OF_TIME: 2}}
    assert "not finite" in " ".join(capsys.readouterr().out.split())


def last_states(policy: Pi05Policy, lanes: int) -> np.ndarray:
    """Where the hand is at the end of three episodes."""
    trials = [Trial("policy", "reach-v3", seed, max_seconds=0.4) for seed in range(3)]
    envs = [MetaWorld().open("reach-v3", VIEW) for _ in range(lanes)]
    states = []
    for first in range(0, 3, lanes):
        some = zip(envs, trials[first : first + lanes], strict=False)
        courses = [Course(env, trial) for env, trial in some]
        run_policy(policy, courses, Clock())
        states += [course.env.state for course in courses]
    for env in envs:
        env.close()
    return np.stack(states)


@pytest.mark.slow
def test_episodes_depend_on_their_seed_and_not_on_the_lanes(untrained):
    policy = Pi05Policy(untrained, execution_horizon=2)
    np.testing.assert_array_equal(last_states(policy, 1), last_states(policy, 1))
    np.testing.assert_allclose(last_states(policy, 3), last_states(policy, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["reach-v2"]}, r"no task 'reach-v2'.*reach-v3"),
        ({"execution_horizon": 99}, "execution_horizon: 99"),
        ({"dataset": "nowhere"}, "dataset: nowhere .*: no such folder"),
        ({"dataset": "."}, "dataset: . .* is no LeRobot v3 dataset"),
        ({"episodes": 0}, "at least 1"),
        ({"videos": -1}, "videos is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"tasks": ["reach-v3", "reach-v3"]}, "tasks: reach-v3 is named twice"),
        ({"modes": ("random", "random")}, "modes: random is named twice"),
        ({"modes": ("random",), "delays": (2,)}, "delays: of the modes rtc and async alone"),
        ({"swaps": {"reach-v3": "push-v3"}}, "swaps: of the instruction swapped alone"),
        ({"paraphrases": Path("nowhere")}, "paraphrases: of the instruction paraphrased alone"),
        ({"env": LeRobotEnv("pushy")}, "pushy"),
        ({"env": LeRobotEnv("metaworld"), "tasks": ["reach-v3"]}, r"cameras \['image'\].*topview"),
        ({"env": LeRobotEnv("metaworld"), "modes": ("expert",)}, "no scripted expert"),
    ],
)
def test_mistake_is_named(untrained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(untrained, **{"episodes": 1, "num_workers": 1, "out": tmp_path, "max_seconds": 0.1} | options)


def test_a_policy_that_names_no_task_needs_some(untrained, tmp_path):
    nameless = Path(shutil.copytree(untrained, tmp_path / "nameless"))
    values = json.loads((nameless / "processor.json").read_text())
    values["robots"]["robot"]["tasks"] = []
    (nameless / "processor.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="tasks: the policy does not say what it was trained on: name some"):
        rollout(nameless, episodes=1, num_workers=1)


def test_where_all_is_over_already_no_process_is_started():
    assert list(run_in_processes(Worker(MetaWorld(), VIEW, "none", {}), [])) == []


def test_modes_that_cannot_be_are_left_out():
    env = LeRobotEnv("metaworld")
    assert available_modes(env, "it is not here", None) == ("policy", "flat", "fast", "random")
    assert available_modes(env, "it is not here", None, subtasks=False, fast=False) == ("policy", "random")
    assert available_modes(env, None, ("flat",), subtasks=False) == ("flat",)


def test_initial_states_of_a_task_are_the_same_in_every_mode_whatever_else_runs_and_however_many():
    def seeds(tasks: list[str], episodes: int) -> dict[tuple[str, str], list[int]]:
        jobs = Plan(MetaWorld(), tasks, ("policy", "random"), episodes).jobs()
        return {(job.mode, job.task): [trial.seed for trial in job.trials] for job in jobs}

    both, alone = seeds(["a", "b"], 3), seeds(["b"], 5)
    assert both["policy", "b"] == both["random", "b"] == alone["policy", "b"][:3]


@pytest.mark.slow
def test_policy_of_fast_tokens_runs_in_closed_loop(fast_policy, tmp_path):
    options = {"episodes": 1, "modes": ("policy",), "max_seconds": 0.3, "num_workers": 1, "out": tmp_path}
    with pytest.raises(ValueError, match=r"`actions: flow`.*It can act with `actions: fast`"):
        rollout(fast_policy, ["reach-v3"], **options)
    # what a policy of one step does differs from processor to processor, and may close the gripper as nobody did
    found = rollout(fast_policy, ["reach-v3"], actions="fast", max_state_distance=None, **options)
    assert found["acting"]["policy"]["actions"] == "fast"
    assert found["failures"]["policy"] == {"reach-v3": {OUT_OF_TIME: 1}}


# --- environments of LeRobot


@pytest.fixture
def lerobot_drawer():
    cameras = {"topview": "image", "gripperPOV": "image"}
    env = LeRobotEnv("metaworld", cameras=cameras).open("drawer-open-v3", VIEW)
    yield env
    env.close()


def test_lerobots_environment_is_seen_as_lerobot_evaluates_it(lerobot_drawer):
    lerobot_drawer.reset(0)
    frame = lerobot_drawer.observation()
    assert frame.task == "Open a drawer"
    assert {name: (image.shape, image.dtype.name) for name, image in frame.images.items()} == {
        "topview": ((3, 480, 480), "uint8"),
        "gripperPOV": ((3, 480, 480), "uint8"),
    }
    np.testing.assert_allclose(frame.state, lerobot_drawer._env._env._get_obs()[:4], rtol=1e-6)


@pytest.mark.slow
def test_lerobots_environment_begins_the_same_for_the_same_seed(lerobot_drawer):
    seen = []
    for seed in (3, 4, 3):
        lerobot_drawer.reset(seed)
        seen.append(lerobot_drawer.observation().images["topview"])
        lerobot_drawer.step(np.ones(4, np.float32))
    np.testing.assert_array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])


def test_lerobots_environment_gets_no_seed_that_its_generator_refuses():
    env, begun = LeRobotEnvironment.__new__(LeRobotEnvironment), []
    env._env = SimpleNamespace(
        unwrapped=None, reset=lambda seed: (begun.append(np.random.RandomState(seed).rand()), {})
    )
    for seed in (7, 2**32 - 1, 2**32, 2**32 + 1, 2**32):
        env.reset(seed)
    assert begun[:2] == [np.random.RandomState(seed).rand() for seed in (7, 2**32 - 1)]
    assert len({*begun}) == 4
    assert begun[2] == begun[4]


def test_lerobots_limit_is_taken_over_in_simulated_time(lerobot_drawer):
    assert lerobot_drawer.max_seconds == 500 / 80


def test_action_lasts_as_long_as_the_policys_frame_in_every_simulator(lerobot_drawer):
    env = MetaWorld().open("drawer-open-v3", VIEW)
    for one in (env, lerobot_drawer):
        one.reset(0)
        physics = getattr(one._env, "_env", one._env)  # LeRobot makes it at the first reset
        before = physics.data.time
        one.step(np.zeros(4, np.float32))
        assert (one.fps, physics.data.time - before) == pytest.approx((10.0, 0.1))
    env.close()


@pytest.mark.parametrize("env", [MetaWorld(), LeRobotEnv("metaworld", cameras={"topview": "image"})])
@pytest.mark.parametrize("fps", [30.0, 160.0, 12.5])
def test_rate_that_does_not_divide_the_simulators_is_refused_with_both(env, fps):
    with pytest.raises(NoSuchEnvironment, match=rf"trained at {fps:g} frames per second.* 80 Hz"):
        env.open("reach-v3", View(("topview",), 64, fps))


def test_steps_that_an_action_is_held_for_can_be_given_and_time_stays_the_simulators():
    env, view = LeRobotEnv("metaworld", cameras={"topview": "image"}, action_repeat=4), View(("topview",), 64, 10.0)
    with closing(Lanes(env, view)) as lanes:
        (opened,) = lanes.of("reach-v3", 1)
        assert (opened.fps, opened.max_seconds) == (20.0, 500 / 80)
    given = glimpse(env, ["reach-v3"], view)
    assert (given.robot.fps, given.sets_rate) == (20.0, True)


class ColoursLast(MetaWorld):
    """A simulator of one's own whose images have their colours last."""

    def open(self, task, view):
        env = Walk()
        env.observation = lambda: Frame({"topview": np.zeros((8, 6, 3), np.uint8)}, state=np.zeros(2, np.float32))
        return env


def test_images_of_another_shape_are_named_before_they_are_compared():
    with pytest.raises(ValueError, match=r"image 'topview' of ColoursLast has shape \[8, 6, 3\]: expected \[3 h w\]"):
        glimpse(ColoursLast(), ["walk"], VIEW, expert=False)


@dataclass(frozen=True)
class Hasty(MetaWorld):
    """A simulator of one's own that does not ask at what rate the policy was trained."""

    def open(self, task, view):
        return super().open(task, View(view.cameras, view.image_size, 80.0))


def test_simulator_of_ones_own_at_another_rate_is_refused():
    with closing(Lanes(Hasty(), VIEW)) as lanes, pytest.raises(NoSuchEnvironment, match=r"80 actions .* at 10 frames"):
        lanes.of("reach-v3", 1)


class Endless(MetaWorld):
    """A simulator of one's own in which time is never up."""

    def open(self, task, view):
        env = Walk()
        env.max_seconds = float("inf")
        return env


def test_simulator_without_a_time_limit_asks_for_one():
    with closing(Lanes(Endless(), VIEW)) as lanes:
        for _ in range(2):
            with pytest.raises(NoSuchEnvironment, match="give --max_seconds"):
                lanes.of("walk", 1)
        assert len(lanes.of("walk", 1, max_seconds=3.0)) == 1


@pytest.mark.slow
def test_demonstrations_at_another_rate_are_not_replayed(untrained, collected, tmp_path):
    slow = Path(shutil.copytree(collected / "robot", tmp_path / "robot"))
    info = json.loads((slow / "meta" / "info.json").read_text())
    (slow / "meta" / "info.json").write_text(json.dumps(info | {"fps": 5}))
    with pytest.raises(ValueError, match="recorded at 5 frames per second, and the policy was trained at 10"):
        rollout(untrained, ["reach-v3"], modes=("mean_replay",), dataset=str(slow), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("env", "task", "message"),
    [
        (LeRobotEnv("pushy"), "x", "not registered"),
        (LeRobotEnv("metaworld", {"colour": 1}), "reach-v3", "colour"),
        (LeRobotEnv("metaworld"), "reach-v9", "no task 'reach-v9'"),
        (LeRobotEnv("metaworld"), "easy/99", "no task 'easy/99'"),
    ],
)
def test_what_lerobot_does_not_have_is_named(env, task, message):
    with pytest.raises(NoSuchEnvironment, match=message):
        env.open(task, VIEW)


def test_missing_package_of_an_environment_is_named():
    if importlib.util.find_spec("gym_pusht"):
        pytest.skip("gym-pusht is installed")
    with pytest.raises(NoSuchEnvironment, match=r"pip install 'lerobot\[pusht\]'.*gym_pusht"):
        LeRobotEnv("pusht").open("PushT-v0", VIEW)
