"""Frames that a policy is tried on: of its own data where they can be read, whatever it was trained to put up with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pi05_lightning import Pi05DataModule
from pi05_lightning.acting import Acting
from pi05_lightning.acting.frames import dataset_config, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from tests.data.recorded import data_file, rewrite
from tests.data.test_bad_data import replace_image


def policy_of(dataset: Path, missing_cameras: tuple[str, ...] = (), **config: Any) -> Inference:
    sizes = ModelConfig.preset("debug")
    data = Pi05DataModule({"robot": LeRobotConfig(str(dataset), **config)}, shapes=sizes.shapes)
    return Inference(Pi05(sizes), data.processor, Acting(missing_cameras=missing_cameras))


def test_own_data_that_cannot_be_read_gives_no_frames_and_says_why(
    pictures_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of(pictures_copy)
    rewrite(data_file(pictures_copy), action=None)
    with caplog.at_level(logging.WARNING):
        assert recorded_frames(policy, None) == []
    assert f"no frames of the policy's own data, {pictures_copy}: " in caplog.text
    with pytest.raises(ValueError, match="no usable frame is left"):
        recorded_frames(policy, dataset_config(policy.processor.robots["robot"], str(pictures_copy)))


def test_frames_that_training_leaves_out_or_converts_are_no_error(pictures_copy: Path) -> None:
    policy = policy_of(pictures_copy)
    actions = pq.read_table(data_file(pictures_copy))["action"].to_pylist()
    actions[20] = [float("nan")] * 2
    rewrite(data_file(pictures_copy), action=actions)
    replace_image(pictures_copy, 0, Image.new("L", (64, 48), 100))
    replace_image(pictures_copy, len(actions) - 1, b"damaged")
    first, second = recorded_frames(policy, None)
    assert (first.images["top"] == 100).all()
    assert second.images["top"].shape == (3, 48, 64)


def test_a_policy_without_a_state_reads_its_own_data_without_one(pictures: Path) -> None:
    policy = policy_of(pictures, state_keys=[])
    assert [frame.state for frame in recorded_frames(policy, None)] == [None] * 3


def test_frames_may_lack_the_cameras_that_the_policy_acts_without_and_no_others(videos: Path) -> None:
    one = {"observation.images.top": "top"}
    policy = policy_of(videos, missing_cameras=("wrist",))
    robot = policy.processor.robots["robot"]
    frames = recorded_frames(policy, dataset_config(robot, str(videos), cameras=one))
    assert [list(frame.images) for frame in frames] == [["top"]] * 3
    with pytest.raises(ValueError, match=r"is not of robot: it has the cameras \['top'\]"):
        recorded_frames(policy_of(videos), dataset_config(robot, str(videos), cameras=one))
