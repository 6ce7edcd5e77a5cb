"""A served policy of random weights, of a robot with two cameras, four state and two action dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi05_lightning import Pi05Policy
from pi05_lightning.data.processor import Processor
from pi05_lightning.weights.folder import save
from tests.random_fast import random_fast
from tests.untrained import untrained_policy


@pytest.fixture(scope="session")
def served(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported policy."""
    keys = ["observation.state", "observation.gripper"]
    return untrained_policy(tmp_path_factory.mktemp("served"), videos, state_keys=keys)


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
