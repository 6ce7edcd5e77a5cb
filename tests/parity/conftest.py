"""Fixtures of the parity tests: dimensions, LeRobot's model with them, and ours with its weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

from benchmarks.peer import build_lerobot
from pi05_lightning.models.config import GemmaConfig, ModelConfig, VisionConfig
from pi05_lightning.models.pi05 import Pi05

from .reference import any_number_of_heads, convert

SIZES = {
    "narrow_heads": ModelConfig(
        vision=VisionConfig(image_size=28, patch_size=14, width=144, depth=2, mlp_dim=96, num_heads=2),
        language=GemmaConfig(width=48, depth=3, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=16),
        expert=GemmaConfig(width=32, depth=3, mlp_dim=40, num_heads=8, num_kv_heads=1, head_dim=16),
        vocab_size=2304,
        horizon=6,
        action_dim=5,
    ),
    "wide_heads_one_layer": ModelConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=72, depth=1, mlp_dim=50, num_heads=1),
        language=GemmaConfig(width=40, depth=1, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=24),
        expert=GemmaConfig(width=64, depth=1, mlp_dim=32, num_heads=8, num_kv_heads=1, head_dim=24),
        vocab_size=2304,
        horizon=1,
        action_dim=32,
    ),
    "six_heads_five_layers_odd_widths": ModelConfig(
        vision=VisionConfig(image_size=21, patch_size=7, width=216, depth=3, mlp_dim=33, num_heads=3),
        language=GemmaConfig(width=56, depth=5, mlp_dim=31, num_heads=6, num_kv_heads=1, head_dim=40),
        expert=GemmaConfig(width=24, depth=5, mlp_dim=101, num_heads=6, num_kv_heads=1, head_dim=40),
        vocab_size=3001,
        horizon=11,
        action_dim=1,
    ),
    "one_narrow_head": ModelConfig(
        vision=VisionConfig(image_size=16, patch_size=16, width=72, depth=1, mlp_dim=20, num_heads=1),
        language=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=1, num_kv_heads=1, head_dim=6),
        expert=GemmaConfig(width=40, depth=2, mlp_dim=64, num_heads=1, num_kv_heads=1, head_dim=6),
        vocab_size=2304,
        horizon=50,
        action_dim=7,
    ),
}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES.keys())
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


@pytest.fixture(scope="module")
def lerobot(config: ModelConfig) -> Iterator[PI05Pytorch]:
    with any_number_of_heads():
        yield build_lerobot(config).eval()


@pytest.fixture(scope="module")
def ours(config: ModelConfig, lerobot: PI05Pytorch, tmp_path_factory: pytest.TempPathFactory) -> Pi05:
    return convert(lerobot, config, tmp_path_factory.mktemp("lerobot"))
