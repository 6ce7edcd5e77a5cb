"""All together: LoRA, average, checkpointing, bf16, accumulation, clipping, freezing, insulation, stages, resume."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from pi05_lightning import Pi05Policy
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.ema import WeightAverage
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS, STAGES

from .test_own_head import GripperHead
from .two_ranks import Rounding

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]
STAGES_WITH_FREEZING = {
    "pretrain": StageOptions(STAGES["pretrain"].losses, STAGES["pretrain"].mixture, freeze=(r"backbone\.vision",)),
    "posttrain": StageOptions(
        LossWeights(subtask=1, flow=1),
        STAGES["posttrain"].mixture,
        freeze=(r"backbone\.layers\.0\.",),
        lr_factors={"lora_B": 2.0},
        warmup_steps=1,
    ),
}
OPTIONS: dict[str, Any] = {
    "stages": STAGES_WITH_FREEZING,
    "module_options": {
        "lora": Lora(rank=2, dropout=0.1),
        "activation_checkpointing": True,
        "knowledge_insulation": True,
    },
    "precision": "bf16-mixed",
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 0.5,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "val_check_interval": 2 * TOTAL,
    "check_val_every_n_epoch": None,
}


def load(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


@pytest.fixture
def whole(train: Train, tmp_path: Path) -> dict[str, Any]:
    """The last checkpoint of a run with all features."""
    train(WeightAverage(0.9), **OPTIONS)
    return load(tmp_path, TOTAL)


class DroppingHead(GripperHead):
    """A user's head that draws in every step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layers.insert(0, torch.nn.Dropout(0.5))


@pytest.mark.parametrize("draws", ["optimizer", "head"])
def test_resumed_run_draws_what_one_that_was_not_stopped_did(train: Train, tmp_path: Path, draws: str) -> None:
    options: dict[str, Any] = {"module_options": {"optimizer": partial(Rounding, lr=1e-3)}}
    if draws == "head":
        losses = LossWeights(flow=1, others={"gripper": 1})
        stages = STAGES | {"pretrain": StageOptions(losses, STAGES["posttrain"].mixture)}
        options = {"module_options": {"heads": {"gripper": DroppingHead}}, "stages": stages}
    train(max_steps=2, **options)
    expected = load(tmp_path, 2)["state_dict"]
    (tmp_path / "step=2.ckpt").unlink()
    train(max_steps=2, ckpt_path=tmp_path / "step=1.ckpt", **options)
    found = load(tmp_path, 2)["state_dict"]
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.slow
def test_only_adapters_and_projections_move_and_only_in_their_stage(whole: dict[str, Any], tmp_path: Path) -> None:
    states = [load(tmp_path, step)["state_dict"] for step in (1, PRETRAIN_STEPS, TOTAL)]

    def moved(before: int, after: int) -> set[str]:
        return {name for name, x in states[after].items() if not torch.equal(x, states[before][name])}

    trained = {name for name in states[0] if "lora_" in name or "time_mlp" in name or "action_" in name}
    trained |= {name for name in states[0] if "projector" in name}
    assert moved(0, 1) | moved(1, 2) <= trained
    assert not any("flow_head" in name or "backbone.vision" in name for name in moved(0, 1))
    assert any("backbone.layers.0." in name for name in moved(0, 1))
    assert not any("backbone.layers.0." in name for name in moved(1, 2))
    assert any("flow_head" in name for name in moved(1, 2))


@pytest.mark.slow_cases
@pytest.mark.parametrize("stop", [PRETRAIN_STEPS, PRETRAIN_STEPS + 1])
def test_resumed_run_ends_as_one_that_was_not_stopped(
    train: Train, tmp_path: Path, whole: dict[str, Any], stop: int
) -> None:
    (tmp_path / f"step={TOTAL}.ckpt").unlink()
    train(WeightAverage(0.9), ckpt_path=tmp_path / f"step={stop}.ckpt", **OPTIONS)
    found = load(tmp_path, TOTAL)
    for part in ("state_dict", "ema"):
        assert found[part].keys() == whole[part].keys()
        assert all(torch.equal(found[part][name], x) for name, x in whole[part].items())


def test_policy_is_the_plain_model_with_the_averaged_adapters_merged(whole: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / f"step={TOTAL}.ckpt"
    policy = Pi05Policy(file)
    layer = "flow_head.layers.0.mlp.up_proj"
    a, b = (whole["ema"][f"{layer}.lora_{part}.default.weight"] for part in "AB")
    expected = whole["state_dict"][f"model.{layer}.base_layer.weight"] + (16.0 / 2) * b @ a
    torch.testing.assert_close(policy.model.get_parameter(f"{layer}.weight").data, expected)
    policy.save_pretrained(tmp_path / "exported")
    again = Pi05Policy(tmp_path / "exported").model.state_dict()
    assert all(torch.equal(again[name], x) for name, x in policy.model.state_dict().items())
