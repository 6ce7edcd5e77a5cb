"""What differs between a policy and what it is given is found, named by its dims, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pi05_lightning.data.robot import Robot
from pi05_lightning.data.transforms import Normalize, Quantiles, RelativeActions
from pi05_lightning.evaluation.agreement import Counterpart, agreement, compare_predictions
from pi05_lightning.weights.abilities import Abilities

ABLE = Abilities(("robot",), {"posttrain": 100}, flow=True, fast=False, subtasks=False)
LOW, HIGH = np.array([-1.2, -0.8, 0.3, 0.0]), np.array([1.1, 0.9, 1.8, 1.0])  # three joints in radians, a gripper
HORIZON = 8


def robot(state: tuple[Any, Any] = (LOW, HIGH), action: tuple[Any, Any] = (LOW, HIGH), **options: Any) -> Robot:
    given: dict[str, Any] = {"fps": 10.0, "tasks": ("open the drawer",), "cameras": ("top",), "dataset": "shown"}
    return Robot(Normalize(Quantiles(*state), Quantiles(*action)), **(given | options))


def different(given: Robot, policy: Robot | None = None, **options: Any) -> dict[str, str]:
    found = agreement(policy or robot(), ABLE, HORIZON, Counterpart(given, "theirs", **options))
    assert all(f.then for f in found if f.verdict == "differs")
    return {f.what: f.given for f in found if f.verdict == "differs"}


def changed(dims: list[int], factor: float = 1.0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The quantiles of the same values in other units."""
    low, high = LOW.copy(), HIGH.copy()
    for dim in dims:
        low[dim], high[dim] = sorted((low[dim] * factor + offset, high[dim] * factor + offset))
    return low, high


def test_the_same_robot_in_another_recording_agrees() -> None:
    rng = np.random.default_rng(0)
    low, high = LOW + rng.normal(0, 0.05, 4), HIGH + rng.normal(0, 0.05, 4)
    assert different(robot((low, high), (low, high))) == {}


@pytest.mark.parametrize("resting", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_differs(value: float, resting: bool) -> None:
    low, high = changed([])
    low[2] = high[2] = value
    found = different(robot((low, high)), resting=resting)
    assert found["state, dims 2"].startswith("not finite")


def test_a_joint_that_rests_is_no_difference() -> None:
    low, high = changed([])
    low[1] = high[1] = 0.1
    assert different(robot((low, high))) == {}


@pytest.mark.parametrize(
    ("values", "dims", "said"),
    [
        (changed([0, 1, 2], 180 / np.pi), "0, 1, 2", "like degrees where radians are expected"),
        (changed([0, 1, 2], 1000), "0, 1, 2", "like millimetres where metres are expected"),
        (changed([3], 2, -1), "3", "in -1..1 where 0..1 is expected"),
        (changed([3], 100), "3", "in 0..100 where 0..1 is expected"),
        (changed([2], -1), "2", "of the opposite sign"),
        (changed([0], 1, 20), "0", "ranges beyond"),
    ],
)
@pytest.mark.parametrize("part", ["state", "action"])
def test_other_units_signs_and_intervals_are_told_by_dim(values: Any, dims: str, said: str, part: str) -> None:
    found = different(robot(**{part: values}))
    assert list(found) == [f"{part}, dims {dims}"]
    assert said in found[f"{part}, dims {dims}"]


def test_radians_given_to_a_policy_of_degrees_lie_within_its_range_and_are_found() -> None:
    policy = robot(changed([0, 1, 2], 180 / np.pi))
    assert "like radians where degrees are expected" in different(robot(), policy)["state, dims 0, 1, 2"]


def test_dims_rate_cameras_wording_and_short_episodes() -> None:
    assert different(robot((LOW[:3], HIGH[:3]))) == {"state": "3 dims"}
    assert different(robot(fps=80.0)) == {"rate": "80 Hz"}
    assert different(robot(fps=80.0), sets_rate=True) == {}
    assert different(robot(cameras=("front",))) == {"cameras": "front"}
    assert "'Open drawer.'" in different(robot(tasks=("Open drawer.",)))["instructions"]
    assert different(robot(), episode_seconds=0.5) == {"horizon": "the longest episode is 0.5 s"}
    assert different(robot(), episode_seconds=5.0) == {}


def test_cameras_of_other_names_are_mended_by_an_option_that_names_all_of_them() -> None:
    policy, given = robot(cameras=("topview", "gripperPOV")), robot(cameras=("front_cam", "wrist_cam"))
    features = {f"observation.images.{camera}": camera for camera in given.cameras or ()}
    found = agreement(policy, ABLE, HORIZON, Counterpart(given, "theirs", features=features))
    (mend,) = [f.mend for f in found if f.what == "cameras"]
    named = "{observation.images.front_cam: topview, observation.images.wrist_cam: gripperPOV}"
    assert mend.endswith(f"--cameras '{named}'")
    (mend,) = [f.mend for f in agreement(policy, ABLE, HORIZON, Counterpart(given, "theirs")) if f.what == "cameras"]
    assert "--cameras" not in mend  # a simulator's


def test_actions_recorded_as_offsets_are_no_absolute_ones() -> None:
    policy = robot(action=(LOW / 50, HIGH / 50), relative=RelativeActions((0, 1, 2), (0, 1, 2)))
    same = replace(policy, dataset="theirs")
    assert different(same, policy) == {}
    assert different(replace(same, relative=None), policy)["relative actions"] == "otherwise"


def test_a_simulators_bounds_are_compared_with_what_the_policy_does() -> None:
    bounds = np.array([-2.0, -2, -2, -1]), np.array([2.0, 2, 2, 1])
    found = different(robot(action=bounds), bounds=True)
    assert "another interval than is taken" in found["action, dims 3"]
    found = different(robot(action=(-np.ones(4), np.ones(4))), robot(action=changed([0], 180 / np.pi)), bounds=True)
    assert "beyond what is taken" in found["action, dims 0, 2"]
    assert different(robot(action=(-2 * np.ones(4), 2 * np.ones(4))), bounds=True) == {}


def test_a_policy_without_a_trained_head_for_actions_is_found() -> None:
    unable = replace(ABLE, flow=False)
    (head,) = [f for f in agreement(robot(), unable, HORIZON, Counterpart(robot(), "theirs")) if f.what == "heads"]
    assert head.verdict == "differs"


def test_a_state_that_a_policy_does_not_read_is_no_difference() -> None:
    assert different(robot(), robot(state=(np.zeros(0), np.zeros(0)))) == {}


def test_a_grippers_sign_is_told_by_what_the_policy_predicts() -> None:
    rng = np.random.default_rng(0)
    done = [rng.uniform(LOW, HIGH, (HORIZON, 4)).astype(np.float32) for _ in range(10)]
    near = [chunk + rng.normal(0, 0.1, chunk.shape) for chunk in done]
    (same,) = compare_predictions(near, done, robot())
    assert same.verdict == "ok"
    (other,) = compare_predictions([chunk * [1, 1, 1, -1] for chunk in near], done, robot())
    assert (other.verdict, other.what) == ("differs", "predictions, dims 3")


@pytest.mark.parametrize("frames", [3, 6, 16])
def test_a_policy_that_follows_nothing_is_hardly_ever_said_to_move_the_other_way(frames: int) -> None:
    rng, dims = np.random.default_rng(0), 32
    policy = robot(action=(-np.ones(dims), np.ones(dims)))
    found = [compare_predictions(*rng.uniform(-1, 1, (2, frames, 1, dims)), policy)[0] for _ in range(200)]
    assert sum(f.verdict == "differs" for f in found) <= 6  # 2 are expected
    assert all(f"by chance {frames} frames may have -" in f.given for f in found if f.verdict == "unknown")


@pytest.mark.parametrize(("frames", "verdict"), [(2, "unknown"), (5, "differs"), (6, "differs")])
def test_few_frames_tell_a_sign_where_the_policy_follows_closely(frames: int, verdict: str) -> None:
    rng = np.random.default_rng(0)
    done = rng.uniform(LOW, HIGH, (frames, HORIZON, 4)).astype(np.float32)
    (found,) = compare_predictions(-done + rng.normal(0, 0.005, done.shape), done, robot())
    assert found.verdict == verdict
