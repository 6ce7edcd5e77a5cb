"""What a policy is asked with: nothing of it may be missing, misnamed or out of range without a word."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pi05_lightning import Pi05DataModule, Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.transforms import Normalize, Quantiles
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.sim.rollout import view_of
from pi05_lightning.types import Frame
from tests.untrained import untrained_model

CONFIG = ModelConfig.preset("debug")


@pytest.fixture(scope="module")
def data(videos: Path) -> Pi05DataModule:
    return Pi05DataModule({"robot": LeRobotConfig(str(videos), val_fraction=0.2)}, shapes=CONFIG.shapes)


@pytest.fixture(scope="module")
def model() -> Pi05:
    return untrained_model()


@pytest.fixture
def policy(model: Pi05, data: Pi05DataModule) -> Pi05Policy:
    return acting(model, data)


def acting(model: Pi05, data: Pi05DataModule, changes: dict[str, Any] | None = None, **how: Any) -> Pi05Policy:
    """A policy that acts so, over its own copy of the processor. changes: of what it knows of its robot."""
    processor = Processor.from_dict(data.processor.to_dict())
    processor.robots["robot"] = replace(processor.robots["robot"], **changes or {})
    return Pi05Policy((model, processor), **how)


@pytest.fixture(scope="module")
def frame(data: Pi05DataModule) -> Frame:
    return data.sources("val")["robot"][0]


@pytest.fixture
def seen(frame: Frame) -> dict[str, Any]:
    images = {camera: image.copy() for camera, image in frame.images.items()}
    return {"image": images, "state": frame.state.copy(), "task": frame.task}


def spoken(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


# --- what is missing or misnamed


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("images", r"no key 'images' \(did you mean image\?\); it has image, state, task"),
        ("prompt", "no key 'prompt'; it has image, state, task"),
        ("observation.state", r"\(did you mean state\?\)"),
        ("tasks", r"\(did you mean task\?\)"),
        (3, "no key 3"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(policy, seen, key, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.predict({**seen, key: 1})


@pytest.mark.parametrize("missing", ["image", "state", "task"])
@pytest.mark.parametrize("ask", ["predict", "predict_chunk", "predict_subtask", "prepare"])
def test_what_training_always_had_is_not_left_out(policy, seen, ask: str, missing: str) -> None:
    for given in ({key: value for key, value in seen.items() if key != missing}, {**seen, missing: None}):
        with pytest.raises(ValueError, match=f"^{missing}.* missing"):
            getattr(policy, ask)(given)


def test_a_frame_lacks_nothing_either(policy, frame: Frame) -> None:
    for change in ({"images": {}}, {"state": None}, {"task": ""}):
        for ask in (policy.predict_chunk, policy.predict_subtask, lambda f: policy.predict_chunks([f], [None])):
            with pytest.raises(ValueError, match="missing"):
                ask(replace(frame, **change))


def test_misnamed_camera_is_refused_with_the_nearest(policy, seen) -> None:
    with pytest.raises(ValueError, match=r"no camera 'wrists' \(did you mean wrist\?\); it has top, wrist"):
        policy.predict({**seen, "image": {"top": seen["image"]["top"], "wrists": seen["image"]["wrist"]}})


def test_camera_may_be_missing_by_name_and_that_is_said_once(model, data, seen, caplog) -> None:
    policy = acting(model, data, missing_cameras=["wrist"])
    del seen["image"]["wrist"]
    alone = {**seen, "image": seen["image"]["top"]}
    assert np.array_equal(policy.prepare(seen).pixels, policy.prepare(alone).pixels)
    policy.predict_chunk(seen)
    assert spoken(caplog) == ["the camera wrist is missing, as missing_cameras allows"]
    assert view_of(policy).cameras == ("top",)


@pytest.mark.parametrize(("given", "message"), [(["wist"], r"did you mean wrist\?"), ("wrist", "give a list of names")])
def test_missing_cameras_are_cameras(model, data, given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acting(model, data, missing_cameras=given)


def test_one_image_of_two_is_not_given_to_the_first_camera(policy, seen) -> None:
    with pytest.raises(ValueError, match=r"cameras are top, wrist: give \{camera: image\}"):
        policy.predict({**seen, "image": seen["image"]["top"]})


def test_camera_of_other_data_is_none_of_the_robots(model, data, seen) -> None:
    policy = acting(model, data, {"cameras": ("top",)})
    policy.predict({**seen, "image": seen["image"]["top"]})
    with pytest.raises(ValueError, match="no camera 'wrist'; it has top"):
        policy.predict(seen)


def test_older_checkpoints_robot_has_all_the_cameras(data, model, seen) -> None:
    values = data.processor.to_dict()
    for name in ("cameras", "state_range"):
        del values["robots"]["robot"][name]
    policy = Pi05Policy((model, Processor.from_dict(values)))
    assert policy.inputs.cameras == ("top", "wrist")
    policy.predict(seen)


def test_task_as_long_as_those_of_the_training_is_taken(model, data, seen) -> None:
    long = "open the drawer " * 100
    policy = acting(model, data, {"tasks": (long,)})
    policy.predict_chunk(seen | {"task": long})
    with pytest.raises(ValueError, match=f"max_prompt_bytes is {len(long)}: shorten it"):
        policy.predict_chunk(seen | {"task": long + "now"})


def test_turned_images_are_said_at_the_first_observation(model, data, seen, caplog) -> None:
    turned = {camera: np.ascontiguousarray(image[:, ::-1, ::-1]) for camera, image in seen["image"].items()}
    policy = acting(model, data)
    for _ in range(2):
        policy.predict_chunk(seen)
    assert not spoken(caplog)
    for _ in range(2):
        policy.session(0).predict_chunk(seen | {"image": turned})
    assert len(spoken(caplog)) == 2 * len(turned)
    for camera in turned:
        assert any(f"image {camera!r} looks turned by 180°" in said for said in spoken(caplog))


def test_task_may_be_left_out_where_the_robot_has_one_and_that_is_said_once(model, data, seen, caplog) -> None:
    policy = acting(model, data, {"tasks": ("close the drawer",)})
    without = {"image": seen["image"], "state": seen["state"]}
    told, untold = (policy.prepare(one).tokens for one in ({**seen, "task": "close the drawer"}, without))
    assert torch.equal(told, untold)
    policy.predict(without)
    assert spoken(caplog) == [
        "no task is given: 'close the drawer' is taken, the only one that the policy was trained on"
    ]


@pytest.mark.parametrize(
    ("task", "message"), [("", "blank"), (" \n", "blank"), ("_", "blank"), (["open"], "a list"), (b"open", "bytes")]
)
def test_task_is_text(model, data, seen, task, message: str) -> None:
    with pytest.raises(ValueError, match=f"task is {message}|task is a {message}"):
        acting(model, data, {"tasks": ("close the drawer",)}).predict({**seen, "task": task})


def test_task_that_was_never_trained_is_taken_and_said_once(policy, seen, caplog) -> None:
    for task in ("open_the drawer", "open the drawers", "open the drawers"):
        policy.predict_chunk({**seen, "task": task})
    said = "the policy was never trained on the task 'open the drawers' (did you mean open the drawer?)"
    assert spoken(caplog) == [said]


def test_no_task_is_suggested_where_looking_through_all_of_them_takes_long() -> None:
    tasks = [f"open the drawer number {number}" for number in range(3000)]
    assert suggestion("open the drawer numbr 7", tasks[:100])
    assert not suggestion("open the drawer numbr 7", tasks)


# --- numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([0, np.nan, 0], r"state\[1\] is nan"),
        ([0, 0, np.inf], r"state\[2\] is inf"),
        ([0, 0, -1e300], r"state\[2\] is -1e\+300"),
        (np.zeros(9), "state has 9 dimensions, and the policy was trained with 3"),
        (np.zeros((3, 1)), r"state has shape \[3, 1\]: expected \[S\]"),
        (np.zeros((2, 3)), r"state has shape \[2, 3\]"),
        (np.zeros((1, 1, 3)), r"state has shape \[1, 1, 3\]"),
        (["a", "b", "c"], "state holds text"),
        ([True, False, True], "state holds truth values"),
        (np.ma.masked_array(np.zeros(3), [0, 1, 0]), "state cannot be read .* masked"),
        ([None, 1, 2], "state holds objects"),
        ([[1], [2, 3]], "state cannot be read"),
        ({"x": 1}, "state holds objects"),
    ],
)
def test_state_that_is_none_is_refused(policy, seen, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.predict({**seen, "state": change})


def test_state_for_a_policy_without_one_is_refused(videos, seen) -> None:
    robot = LeRobotConfig(str(videos), val_fraction=0.2, state_keys=[])
    policy = acting(untrained_model(), Pi05DataModule({"robot": robot}, shapes=CONFIG.shapes))
    with pytest.raises(ValueError, match="a state is given, and the policy was trained without one"):
        policy.predict(seen)
    assert np.isfinite(policy.predict({**seen, "state": None})).all()


def test_state_outside_the_training_data_is_said_once_per_dimension_with_its_distance(policy, seen, caplog) -> None:
    quantiles = policy.processor.robots["robot"].normalize.state
    span = quantiles.q99 - quantiles.q01
    far = seen["state"].copy()
    far[2] = quantiles.q99[2] + 3 * span[2]
    for factor in (1, 1.001):
        policy.predict_chunk({**seen, "state": far * factor})
    far[0] = quantiles.q01[0] - 2 * span[0]
    policy.predict_chunk({**seen, "state": far})
    assert [said.partition(" is ")[0] for said in spoken(caplog)] == ["state[2]", "state[0]"]
    assert ": 3 quantile ranges outside the training data" in spoken(caplog)[0]
    assert f"are {quantiles.q01[0]:.6g} (1 %) and {quantiles.q99[0]:.6g} (99 %)" in spoken(caplog)[1]


def test_every_robot_of_a_policy_is_spoken_of(policy, seen, caplog) -> None:
    quantiles = policy.processor.robots["robot"].normalize.state
    far = {**seen, "state": quantiles.q99 + 3 * quantiles.span * np.array([0, 0, 1])}
    for robot in (policy.session(0), policy.session(1)):
        robot.predict_chunk(far)
        robot.predict_chunk(far)
    assert [said.partition(" is ")[0] for said in spoken(caplog)] == ["state[2]", "state[2]"]


@pytest.mark.parametrize(
    "change", [np.rad2deg, lambda state: state + np.array([0, 1e30, 0]), lambda state: 1000 * state]
)
def test_state_in_other_units_is_refused(policy, seen, change) -> None:
    with pytest.raises(ValueError, match=r"state\[\d\] is .* quantile ranges outside .* More than 5 are refused"):
        policy.predict({**seen, "state": change(seen["state"])})


def test_bound_of_the_state_can_be_set(model, data, seen) -> None:
    far = {**seen, "state": seen["state"] * 1000}
    assert np.isfinite(acting(model, data, max_state_distance=None).predict(far)).all()
    with pytest.raises(ValueError, match=r"More than 0\.1 are refused"):
        acting(model, data, max_state_distance=0.1).predict({**seen, "state": seen["state"] + 5})


def test_no_state_that_was_recorded_is_refused_or_spoken_of(policy, data, caplog) -> None:
    for split in ("train", "val"):
        for frame in data.sources(split)["robot"]:
            policy.frame(frame)
    assert not spoken(caplog)


def test_state_that_training_held_is_never_far() -> None:
    """A gripper that was open in one frame of a thousand has hardly a range, and may be open again."""
    quantiles = Quantiles(np.array([-1.0, 0.0]), np.array([1.0, 1e-3]))
    robot = Robot(Normalize(quantiles, quantiles), 10.0, state_range=((-2.0, 0.0), (2.0, 0.8)))
    assert robot.state_distance(np.array([0.0, 0.9])).tolist() == [0, 0]
    assert robot.state_distance(np.array([0.0, 80.0]))[1] > 1000


def test_a_dimension_without_range_is_measured_by_the_widest() -> None:
    quantiles = Quantiles(np.array([-1.0, 0.5]), np.array([1.0, 0.5]))
    np.testing.assert_allclose(quantiles.distance(np.array([1.0, 0.58])), [0, 2], rtol=1e-5)
    assert Quantiles(np.zeros(2), np.zeros(2)).distance(np.array([0.5, 1e30])).tolist() == [0.5, 1e30]
    assert Quantiles(np.zeros(0), np.zeros(0)).distance(np.zeros(0)).shape == (0,)


def test_the_spacing_of_numbers_is_no_error_of_a_dimension_that_hardly_varied() -> None:
    quantiles = Quantiles(np.array([0, 1.57]), np.array([1, 1.57 + 1e-6]))
    spacing = np.spacing(quantiles.q99[1])
    assert spacing / quantiles.span[1] > 0.1
    assert spacing / quantiles.computed_unit[1] < 1e-4
    assert quantiles.computed_unit[0] == 1


def test_errors_of_a_dimension_of_small_units_are_measured_by_its_own_range() -> None:
    """Joints in degrees, and a base in metres per second."""
    quantiles = Quantiles(np.array([-90, -90, -90, -0.3]), np.array([90, 90, 90, 0.3]))
    assert quantiles.computed_unit == pytest.approx([180, 180, 180, 0.6])
    assert Quantiles(np.zeros(1), np.zeros(1)).computed_unit == pytest.approx([1e-8])


def test_a_dimension_of_large_units_hides_no_other() -> None:
    """Six joints in radians and a base in millimetres; the last joint is held."""
    quantiles = Quantiles(np.array([-1.0, -1, -1, -1, -1, 0, 0]), np.array([1.0, 1, 1, 1, 1, 1e-4, 5000]))
    degrees = np.array([57.0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(quantiles.distance(degrees), [28, 0, 0, 0, 0, 0, 0], rtol=1e-5)
    moved = np.array([0, 0, 0, 0, 0, 0.0401, 0])
    np.testing.assert_allclose(quantiles.distance(moved), [0, 0, 0, 0, 0, 1, 0], rtol=1e-5)


# --- images


def floats(images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: (image / 255).astype(np.float32) for name, image in images.items()}


def test_float_images_in_0_to_1_are_the_same_as_uint8(policy, seen) -> None:
    one, other = (policy.prepare(o).pixels.float() for o in (seen, {**seen, "image": floats(seen["image"])}))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: torch.from_numpy(x).half(),
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: torch.from_numpy(x).double(),
        lambda x: x.tolist(),
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(">f4"),
    ],
)
def test_numbers_of_any_library_and_type_are_the_same_numbers(policy, seen, convert) -> None:
    given = {
        **seen,
        "image": {k: convert(v) for k, v in floats(seen["image"]).items()},
        "state": convert(seen["state"]),
    }
    found, expected = policy.prepare(given), policy.prepare(seen)
    torch.testing.assert_close(found.pixels, expected.pixels.float(), rtol=0, atol=1)
    assert np.isfinite(policy.predict(given)).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((3, 8, 8), 200.0), r"image 'top'\[0, 0, 0\] is 200\.0: floats are in 0\.\.1 \(divide"),
        (np.linspace(-1, 1, 192).reshape(3, 8, 8), r"image 'top'\[0, 0, 0\] is -1\.0"),
        (np.where(np.arange(192).reshape(3, 8, 8) == 77, np.nan, 0.5), r"image 'top'\[1, 1, 5\] is nan"),
        (np.full((3, 8, 8), 200), "image 'top' is int64"),
        (np.full((3, 8, 8), 200, np.uint16), "image 'top' is uint16"),
        (np.ones((3, 8, 8), bool), "image 'top' holds truth values"),
        (np.zeros((3, 0, 0), np.uint8), r"image 'top' has shape \[3, 0, 0\]"),
        (np.zeros((8, 8, 3), np.uint8), r"shape \[8, 8, 3\]: expected \[3 H W\]"),
        (np.zeros((1, 8, 8), np.uint8), r"shape \[1, 8, 8\]"),
        (np.zeros((4, 8, 8), np.uint8), r"shape \[4, 8, 8\]"),
        (np.zeros((8, 8), np.uint8), r"shape \[8, 8\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \[2, 3, 8, 8\]"),
        (np.zeros((1, 1, 3, 8, 8), np.uint8), r"shape \[1, 1, 3, 8, 8\]"),
        (None, "image 'top' holds objects"),
        ("top.png", "image 'top' holds text"),
    ],
)
def test_image_that_is_none_is_refused(policy, seen, image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.predict({**seen, "image": {**seen["image"], "top": image}})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((3, 8, 8), np.nan, np.float32), "is nan"),
        (np.full((3, 8, 8), 300, np.float32), r"is 300\.0"),
        (np.full((3, 8, 8), 3, np.int64), "is int64"),
        (np.zeros((3, 8, 0), np.uint8), "shape"),
    ],
)
def test_image_of_a_frame_is_refused_too(policy, frame: Frame, image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.predict_chunks([frame, replace(frame, images={**frame.images, "top": image})], [None, None])


# --- what else callers give


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": np.full((8, 6), np.nan)}, r"noise\[0, 0\] is nan"),
        ({"noise": torch.full((8, 6), torch.inf)}, r"noise\[0, 0\] is inf"),
        ({"noise": [["a"] * 6] * 8}, "noise holds text"),
        ({"prefix_actions": [[0, np.nan]]}, r"prefix_actions\[0, 1\] is nan"),
        ({"prefix_actions": torch.full((2, 2), -torch.inf)}, r"prefix_actions\[0, 0\] is -inf"),
    ],
)
def test_noise_and_prefix_actions_are_finite(policy, seen, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.predict_chunk(seen, **given)


def test_noise_may_be_of_any_library(policy, seen) -> None:
    noise = torch.randn(8, 6).bfloat16()
    chunks = [policy.predict_chunk(seen, one) for one in (noise, noise.float().numpy(), noise.float().tolist())]
    assert np.array_equal(chunks[0], chunks[1])
    assert np.array_equal(chunks[0], chunks[2])


@pytest.mark.parametrize("name", ["noise_scale", "temperature", "max_state_distance", "max_action_distance"])
@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_bounds_are_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        Acting(**{name: value})


def test_bad_observation_is_refused_when_it_comes_and_the_queue_goes_on(model, data, seen) -> None:
    one, other = (acting(model, data, pred_horizon=4, inference_delay=2, seed=3) for _ in range(2))
    expected = [one.predict(seen) for _ in range(6)]
    found = [other.predict(seen)]
    for _ in range(5):
        with pytest.raises(ValueError, match=r"state\[0\] is nan"):
            other.predict({**seen, "state": seen["state"] * np.nan})
        found.append(other.predict(seen))
    assert np.array_equal(found, expected)


# --- what leaves


@pytest.fixture
def broken(data, seen) -> Pi05Policy:
    """A policy with a weight that is not finite."""
    model = untrained_model()
    policy = acting(model, data, inference_delay=1, pred_horizon=2, hierarchical=False)
    policy.predict(seen)
    with torch.no_grad():
        next(reversed(list(model.flow_head.parameters()))).fill_(torch.nan)
    return policy


def test_no_action_that_is_not_finite_leaves(broken: Pi05Policy, seen, frame: Frame) -> None:
    for ask in (broken.predict_chunk, lambda _: broken.predict_chunks([frame], [None])):
        with pytest.raises(ValueError, match=r"action\[0, 0\] is nan"):
            ask(seen)
    for _ in range(2):
        broken.predict(seen)  # what was computed before
    with pytest.raises(ValueError, match=r"action\[\d, 0\] is nan"):  # from the background
        broken.predict(seen)


def test_actions_may_be_bounded(model, data, seen) -> None:
    noise = np.full((8, 6), 3.0)
    chunk = acting(model, data).predict_chunk(seen, noise)
    distance = data.processor.robots["robot"].normalize.action.distance(chunk).max()
    within, beyond = (acting(model, data, max_action_distance=factor * distance) for factor in (1.01, 0.99))
    assert np.array_equal(within.predict_chunk(seen, noise), chunk)
    with pytest.raises(ValueError, match=r"action\[\d, \d\] is .* and max_action_distance is"):
        beyond.predict_chunk(seen, noise)


def test_bound_of_relative_actions_is_that_of_their_offsets(videos: Path, model, seen) -> None:
    config = LeRobotConfig(str(videos), relative_dims=[0, 1], val_fraction=0.2)
    data = Pi05DataModule({"robot": config}, shapes=CONFIG.shapes)
    robot = data.processor.robots["robot"]
    offset = robot.normalize.action.q99 + robot.normalize.action.span * np.array([0, 2])
    actions = (offset + seen["state"][:2])[None]
    distance = robot.action_distance(actions, Frame(state=seen["state"]))
    np.testing.assert_allclose(distance, [[0, 2]], atol=1e-5)


def test_robot_says_what_its_data_has(data) -> None:
    robot = data.processor.robots["robot"]
    states = np.stack([frame.state for frame in data.sources("train")["robot"]])
    assert robot.cameras == ("top", "wrist")
    np.testing.assert_array_equal(robot.state_range, [states.min(0), states.max(0)])
    again = Robot.from_dict(robot.to_dict())
    assert (again.cameras, again.state_range) == (robot.cameras, robot.state_range)
    assert asdict(Acting())["max_state_distance"] == 5
