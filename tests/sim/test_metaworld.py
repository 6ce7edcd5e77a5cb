from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from pi05_lightning.sim.environment import NoSuchEnvironment
from pi05_lightning.sim.metaworld.environment import MetaWorld, MetaWorldEnvironment, import_metaworld, task_names
from pi05_lightning.sim.metaworld.tasks import LANGUAGE, task_of_sentence
from pi05_lightning.sim.splits import split_seeds


@pytest.fixture(scope="module")
def drawer():
    with MetaWorldEnvironment("drawer-open-v3") as env:
        yield env


@pytest.fixture(scope="module")
def reach():
    with MetaWorldEnvironment("reach-v3") as env:
        yield env


def test_initial_state_depends_on_seed_and_not_on_what_came_before(drawer):
    drawer.reset(7)
    images, places = drawer.render(), drawer.positions()
    drawer.reset(8)
    for _ in range(30):
        drawer.control_step(drawer.expert_action())
    drawer.reset(7)
    np.testing.assert_equal(drawer.positions(), places)
    np.testing.assert_equal(drawer.render(), images)


def test_seeds_differ_and_tasks_differ_at_the_same_seed(drawer, reach):
    where = []
    for env, name in ((drawer, "drawer"), (reach, "red ball")):
        for seed in (0, 1):
            env.reset(seed)
            where.append(env.positions()[name][0])
    assert len(np.unique(np.round(where, 6))) == 4


def test_splits_and_base_seeds_share_no_initial_state():
    drawn = [set(split_seeds(split, 1000, seed)) for split in ("train", "val", "rollout") for seed in (0, 1)]
    assert len(set.union(*drawn)) == sum(len(seeds) for seeds in drawn)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'test' is unknown.*train, val, rollout"):
        split_seeds("test", 1)


def test_observation_does_not_know_the_goal(reach):
    states = []
    for seed in (0, 1):
        reach.reset(seed)
        states.append(reach.observation().state)
    assert states[0].shape == (4,)
    np.testing.assert_array_equal(*states)


def test_expert_knows_the_goal_during_the_episode(reach):
    reach.reset(0)
    solved = [reach.control_step(reach.expert_action()) for _ in range(100)]
    assert any(solved)


def test_step_holds_the_action_for_its_control_steps(drawer):
    action = np.array([0.3, -0.2, 0.1, 1.0], np.float32)
    drawer.reset(0)
    drawer.step(action)
    held = drawer.state
    drawer.reset(0)
    for _ in range(drawer.action_repeat):
        drawer.control_step(action)
    np.testing.assert_array_equal(drawer.state, held)


def test_leaving_out_what_is_out_of_view_changes_no_pixel(drawer, monkeypatch):
    drawer.reset(0)
    images = drawer.render()
    monkeypatch.setattr(drawer._views, "_in_view", lambda data, camera: np.full(drawer._env.model.ngeom, True))
    np.testing.assert_equal(drawer.render(), images)


def test_boxes_follow_the_object(drawer):
    places, centres = [], []
    for seed in range(6):
        drawer.reset(seed)
        box = drawer.boxes()["topview"]["drawer"]
        places.append(drawer.positions()["drawer"][0])
        centres.append((box[1] + box[3]) / 2)
    assert np.corrcoef(places, centres)[0, 1] > 0.99


def test_box_encloses_exactly_the_pixels_that_change_with_the_object(reach):
    reach.reset(0)
    shown = reach.render()["topview"]
    box = reach.boxes()["topview"]["red ball"]
    site = reach._env.model.site("goal").id
    colour = reach._env.model.site_rgba[site].copy()
    reach._env.model.site_rgba[site] = 0
    changed = (reach.render()["topview"] != shown).any(0)
    reach._env.model.site_rgba[site] = colour
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert box == (rows[0] / 64, columns[0] / 64, (rows[-1] + 1) / 64, (columns[-1] + 1) / 64)


def test_what_a_camera_does_not_see_has_no_box():
    with MetaWorldEnvironment("window-open-v3") as env:
        env.reset(0)
        boxes = env.boxes()
    assert "window handle" in boxes["topview"]
    assert "window handle" not in boxes["gripperPOV"]


def test_corner2_is_upright():
    with MetaWorldEnvironment("reach-v3", cameras=("corner2",)) as env:
        env.reset(0)
        tops = []
        for height in (0.1, 0.3):
            env.place_hand(np.array([0.0, 0.6, height]), effort=-1.0)
            tops.append(env.boxes()["corner2"]["gripper"][0])
    assert tops[1] < tops[0]


@pytest.mark.parametrize("task", MetaWorld.demonstrated)
def test_expert_goes_through_the_phases_of_a_task(task):
    with MetaWorldEnvironment(task) as env:
        env.reset(0)
        objects = set(env.boxes()["topview"])
        phases, solved = [], False
        while not solved and len(phases) < 300:
            phases.append(env.subtask())
            solved = env.control_step(env.expert_action())
    assert solved
    assert any(earlier != later for earlier, later in pairwise(phases))
    assert objects & set(LANGUAGE[task].objects)


def test_no_two_tasks_share_a_sentence():
    assert len({LANGUAGE[task].sentence for task in task_names()}) == 50


def test_sentences_lead_back_to_their_tasks():
    assert [task_of_sentence(LANGUAGE[task].sentence) for task in task_names()] == task_names()


def test_policy_of_another_simulator_is_told_what_it_was_trained_on():
    known = [LANGUAGE[task].sentence for task in MetaWorld.demonstrated]
    assert MetaWorld().tasks(SimpleNamespace(tasks=known)) == [*MetaWorld.demonstrated]
    with pytest.raises(NoSuchEnvironment, match=r"trained on 'press the red button', .* \(`env`, as MT50 or Desk\)"):
        MetaWorld().tasks(SimpleNamespace(tasks=[*known, "press the red button"]))


@pytest.mark.slow
@pytest.mark.parametrize("task", import_metaworld() and task_names())
def test_every_task_runs(task):
    with MetaWorldEnvironment(task) as env:
        env.reset(0)
        env.step(env.expert_action())
        frame = env.observation()
    assert {name: image.shape for name, image in frame.images.items()} == dict.fromkeys(env.cameras, (3, 64, 64))
    assert frame.task == LANGUAGE[task].sentence


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"no task 'drawer-open-v2' \(did you mean drawer-open-v3\?\): use one of"):
        MetaWorldEnvironment("drawer-open-v2")


def test_unknown_camera_is_named():
    with pytest.raises(ValueError, match=r"no camera 'wrist'.*gripperPOV"):
        MetaWorldEnvironment("reach-v3", cameras=("wrist",))


def test_missing_simulator_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(NoSuchEnvironment, match=r"pip install 'pi05_lightning\[sim\]'"):
        import_metaworld()


@pytest.mark.slow_cases
@pytest.mark.parametrize("backend", ["osmesa", "glfw", "wrong", "disable"])
def test_rendering_that_fails_says_what_to_set(tmp_path, backend):
    command = [sys.executable, "-m", "pi05_lightning", "collect", str(tmp_path / "data"), "--tasks", "[reach-v3]"]
    gone = {"PYOPENGL_OSMESA_LIBRARY": "gone", "DISPLAY": ""}  # where there are a screen and OSMesa
    run = subprocess.run(command, env=os.environ | gone | {"MUJOCO_GL": backend}, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"pi05 collect: MuJoCo cannot render with MUJOCO_GL={backend}" in run.stderr
    assert "libegl1" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_closed_environment_leaves_the_interpreter_in_silence():
    program = (
        "from pi05_lightning.sim.metaworld.environment import MetaWorldEnvironment\n"
        "with MetaWorldEnvironment('reach-v3') as env:\n    env.reset(0); env.render()\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert run.stderr == ""
