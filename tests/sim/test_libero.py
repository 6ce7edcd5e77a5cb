"""LIBERO: the benchmark's initial states, LeRobot's observations, other goals in a scene, and what a policy expects."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pi05_lightning.cli.main import main
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.sim import libero
from pi05_lightning.sim.environment import EnvironmentConfig, NoSuchEnvironment, SharedScene, View
from pi05_lightning.sim.simulators import LeRobotEnv, Libero
from pi05_lightning.sim.splits import EXPERIENCE
from tests.untrained import untrained_policy

VIEW = View(("image", "image2"), 64, 20.0)
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None, reason="the extra `libero` is not installed (1.2 GB)"
)


@pytest.mark.parametrize("env", [Libero(), LeRobotEnv("libero")])
def test_liberos_first_initial_states_are_run_as_it_is_evaluated(env: EnvironmentConfig) -> None:
    assert (env.num_states, env.held_out) == (50, False)
    assert env.seeds(50, seed=0) == list(range(50))
    assert env.seeds(10, seed=1) == list(range(10, 20))
    assert env.seeds(3, 7, EXPERIENCE) == [49, 48, 47]
    assert env.sets_rate == isinstance(env, Libero)


@pytest.mark.parametrize(("episodes", "seed", "split"), [(51, 0, "rollout"), (25, 2, "rollout"), (51, 0, EXPERIENCE)])
def test_initial_states_that_there_are_not_are_refused(episodes: int, seed: int, split: str) -> None:
    with pytest.raises(ValueError, match=f"{episodes} episodes with seed {seed} would begin in some of them again"):
        Libero().seeds(episodes, seed, split)


def test_a_tasks_sentence_is_its_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["pick up the bowl", "open the drawer"]
    suite = SimpleNamespace(n_tasks=2, get_task=lambda number: SimpleNamespace(language=said[number]))
    monkeypatch.setattr(libero, "_suite", {"libero_goal": suite}.__getitem__)
    assert Libero().sentences("libero_goal/1") == ("open the drawer",)


@pytest.mark.skipif(importlib.util.find_spec("libero") is not None, reason="the extra `libero` is installed")
def test_missing_libero_names_the_extra():
    with pytest.raises(NoSuchEnvironment, match=r"pip install 'pi05_lightning\[libero\]'"):
        Libero().tasks(None)


@pytest.mark.slow
@needs_libero
def test_libero_begins_from_the_benchmarks_states_and_has_lerobots_eight_dimensions():
    env = Libero(image_size=64).open("libero_spatial/3", VIEW)
    from robosuite.utils.transform_utils import quat2axisangle  # what LIBERO's datasets were recorded with

    try:
        env.reset(1)
        frame = env.observation()
        raw = env._env._env.env._get_observations()
        axis_angle = quat2axisangle(raw["robot0_eef_quat"].copy())
        expected = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        assert frame.task == "pick up the black bowl on the cookie box and place it on the plate"
        assert Libero().sentences("libero_spatial/3") == (frame.task,)
        np.testing.assert_allclose(frame.state, expected, atol=1e-4)
        np.testing.assert_array_equal(frame.images["image"], raw["agentview_image"][::-1, ::-1].transpose(2, 0, 1))
        assert not env.step(np.zeros(7, np.float32))
    finally:
        env.close()


@pytest.mark.slow
@needs_libero
def test_partners_are_tasks_whose_things_are_in_the_scene():
    goal = Libero(("libero_goal",))
    partners = goal.partners(goal.tasks(None))
    assert partners["libero_goal/0"] == "libero_goal/1"
    assert partners["libero_goal/9"] == "libero_goal/0"
    assert Libero().partners(["libero_object/1", "libero_object/0"])["libero_object/0"] == "libero_object/1"
    assert not Libero().partners(["libero_spatial/0"])  # all of them have one goal


@pytest.mark.slow
@needs_libero
def test_another_goal_is_seen_when_it_is_reached():
    env = Libero(image_size=64).open("libero_goal/0", VIEW)
    try:
        env.reset(0)
        assert isinstance(env, SharedScene)
        assert not env.watch("libero_object/1")  # there is no basket
        assert env.watch("libero_goal/1")
        assert not env.step(np.zeros(7))
        assert not env.solved_other
        sim = env._scene.sim
        joint = env._scene.objects_dict["akita_black_bowl_1"].joints[0]
        place = sim.data.get_joint_qpos(joint).copy()
        place[:3] = sim.data.get_site_xpos("flat_stove_1_cook_region") + np.array([0, 0, 0.02])
        sim.data.set_joint_qpos(joint, place)
        assert not any(env.step(np.zeros(7)) for _ in range(10))
        assert env.solved_other
        env.reset(0)
        assert not env.solved_other
    finally:
        env.close()


def recorded(root: Path, image: Callable[[np.ndarray], np.ndarray], gripper: Callable[[float], float]) -> Path:
    """A policy of random weights, of demonstrations in LIBERO that were written in some way."""
    from lerobot.datasets import LeRobotDataset

    features = {
        f"observation.images.{camera}": {"dtype": "image", "shape": (128, 128, 3), "names": ["h", "w", "c"]}
        for camera in VIEW.cameras
    } | {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("pi05/libero", 20, features, root=root / "data", use_videos=False)
    rng = np.random.default_rng(0)
    env = Libero(image_size=128).open("libero_goal/0", VIEW)
    for episode in range(2):
        env.reset(episode)
        for _ in range(30):
            seen = env.observation()
            action = rng.uniform(-1, 1, 7).astype(np.float32)
            action[6] = rng.choice([-1.0, 1.0])
            env.step(action)
            images = {f"observation.images.{c}": image(seen.images[c].transpose(1, 2, 0)) for c in VIEW.cameras}
            written = np.append(action[:6], gripper(action[6])).astype(np.float32)
            dataset.add_frame(
                {**images, "observation.state": seen.state, "action": written, "task": seen.task},
            )
        dataset.save_episode()
    env.close()
    dataset.finalize()
    sizes = replace(ModelConfig.preset("debug"), action_dim=7)
    return untrained_policy(root / "policy", root / "data", sizes, val_fraction=0)


@pytest.mark.slow
@needs_libero
@pytest.mark.parametrize(
    ("image", "gripper", "expected"),
    [
        (lambda image: image, lambda g: g, []),
        (lambda image: np.ascontiguousarray(image[::-1, ::-1]), lambda g: g, ["image image differs", "turned by 180°"]),
        (lambda image: image, lambda g: (g + 1) / 2, ["action, dims 6 differs 0..1", "-1..1"]),
    ],
    ids=["as it is", "images turned", "gripper in 0..1"],
)
def test_check_tells_what_libero_gives_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image, gripper, expected: list[str]
) -> None:
    policy = recorded(tmp_path, image, gripper)
    capsys.readouterr()
    try:
        main(["check", str(policy), "--env", "Libero", "--tasks", "[libero_goal/0]"])
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    said = " ".join(capsys.readouterr().out.split())
    assert status == bool(expected), said
    for words in expected:
        assert words in said
