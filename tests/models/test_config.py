"""The dimensions: shipped sizes are what they say, and what does not fit together is refused."""

from __future__ import annotations

import pytest
import torch

from pi05_lightning.models.config import GemmaConfig, ModelConfig, VisionConfig
from pi05_lightning.models.pi05 import Pi05


def millions(module: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)


@pytest.fixture(scope="module")
def base() -> Pi05:
    return Pi05.without_memory(ModelConfig.preset("base"))


def test_base_has_pi05s_parameters_and_builds_without_memory(base: Pi05) -> None:
    language = millions(base.backbone) - millions(base.backbone.vision)
    projector = millions(base.backbone.vision.projector)
    assert language == pytest.approx(2508.5, abs=0.2)
    assert projector == pytest.approx(2.4, abs=0.1)
    assert millions(base.backbone.vision) - projector == pytest.approx(412.4, abs=0.2)
    assert millions(base.flow_head.layers) + millions(base.flow_head.norm) == pytest.approx(427.9, abs=0.2)
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}


def test_debug_is_below_a_million_parameters() -> None:
    assert millions(Pi05(ModelConfig.preset("debug"))) < 1


@pytest.mark.parametrize("name", ["debug", "tiny", "base"])
def test_a_config_survives_plain_types(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_an_unknown_size_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'huge'.*base, debug, tiny"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize("field", ["depth", "num_heads", "head_dim"])
def test_an_expert_that_cannot_attend_to_the_backbone_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"expert.{field}"):
        ModelConfig(expert=GemmaConfig(width=1024, mlp_dim=4096, **{field: 4}))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads"):
        GemmaConfig(num_heads=8, num_kv_heads=3)
    with pytest.raises(ValueError, match="num_heads"):
        VisionConfig(width=100, num_heads=16)


def test_fast_tokens_need_room_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="no room"):
        Pi05.without_memory(ModelConfig(vocab_size=2000))
