"""The plugin's policy, made and fed as LeRobot's own commands do it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.utils.collate import lerobot_collate_fn

from lerobot_policy_pi05_lightning.configuration_pi05_lightning import Pi05LightningConfig
from lerobot_policy_pi05_lightning.modeling_pi05_lightning import Pi05LightningPolicy
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.models.config import ModelConfig
from tests.untrained import seeing

Make = Callable[..., Pi05LightningPolicy]
Batch = dict[str, Any]


@pytest.fixture(scope="session")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FAST tokenizer for chunks of the debug model's horizon and two action dims."""
    sizes, folder = ModelConfig.preset("debug"), tmp_path_factory.mktemp("fast")
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, sizes.horizon, 2)).astype(np.float32)
    FastTokenizer.fit(chunks, vocab_size=300).save(folder)
    return folder


@pytest.fixture
def make(videos: Path) -> Make:
    """A policy for the recorded dataset (or another `root`), with options, as `lerobot-train` makes it."""

    def made(root: Path = videos, **options: Any) -> Pi05LightningPolicy:
        torch.manual_seed(0)
        meta = LeRobotDatasetMetadata("pi05/recorded", root=root)
        config = Pi05LightningConfig(**{"preset": "debug", "device": "cpu", "push_to_hub": False} | options)
        policy = make_policy(config, ds_meta=meta)
        assert isinstance(policy, Pi05LightningPolicy)
        if policy.config.init_from is None:
            seeing(policy.model)
        return policy

    return made


@pytest.fixture
def batch_of(videos: Path) -> Callable[..., Batch]:
    """A batch of frames as it reaches the policy in `lerobot-train`: loaded, collated, through the preprocessor."""

    def loaded(policy: Pi05LightningPolicy, frames: list[int], root: Path = videos) -> Batch:
        steps = [step / 10 for step in policy.config.action_delta_indices]
        dataset = LeRobotDataset("pi05/recorded", root=root, delta_timestamps={"action": steps}, video_backend="pyav")
        before, _ = make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)
        return before(lerobot_collate_fn([dataset[frame] for frame in frames]))

    return loaded
