"""A served policy of random weights, of a robot with two cameras, four state and two action dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi05_lightning import Pi05DataModule, Pi05Policy
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.folder import save
from tests.random_fast import random_fast


@pytest.fixture(scope="session")
def served(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported policy."""
    sizes = ModelConfig.preset("debug")
    robot = LeRobotConfig(str(videos), state_keys=["observation.state", "observation.gripper"])
    data = Pi05DataModule({"robot": robot}, shapes=sizes.shapes)
    model = Pi05(sizes)
    model.reset_parameters()
    folder = tmp_path_factory.mktemp("served")
    save(folder, model, data.processor)
    return folder


@pytest.fixture(scope="session")
def policy(served: Path) -> Pi05Policy:
    return Pi05Policy(served)


@pytest.fixture(scope="session")
def with_fast(policy: Pi05Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served policy with a FAST tokenizer, and no record of its training."""
    fast = random_fast(policy.processor.shapes).to_dict()
    folder = tmp_path_factory.mktemp("with_fast")
    save(folder, policy.model, Processor.from_dict(policy.processor.to_dict() | {"fast": fast}))
    return folder
