"""Optimizer groups of the real model, that frozen parts cost no backward pass, and what insulation keeps away."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.module.gradient_norms import PARTS, gradient_norms
from pi05_lightning.optim import param_groups
from pi05_lightning.recipe import LossWeights, Recipe, StageOptions
from tests.models.small import make_batch, small_config, small_model, token_nll

RECIPE = Recipe.of(
    pretrain=StageOptions(freeze=(r"backbone\.vision",), lr_factors={r"layers\.0\.": 0.1, "backbone": 0.5}),
    posttrain=StageOptions(lr_factors={"flow_head": 2.0}),
)


@pytest.fixture(params=["debug", "tiny", "base"])
def model(request: pytest.FixtureRequest) -> Pi05:
    return Pi05.without_memory(ModelConfig.preset(request.param))


def test_groups_partition_the_parameters(model: Pi05) -> None:
    grouped = [p for group in param_groups(model.named_parameters(), RECIPE) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_norms_biases_and_embeddings_do_not_decay_and_all_else_does(model: Pi05) -> None:
    groups = param_groups(model.named_parameters(), RECIPE)
    undecayed = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in undecayed}
    matrices = {name for name, p in model.named_parameters() if name not in names}
    assert all(word not in name for name in matrices for word in ("norm", "bias", "embed_tokens", "position_embedding"))
    # the keypoint stem's `identity` says which keypoint a token is: an embedding
    kinds = ("norm", "bias", "embed_tokens", "position_embedding", "identity")
    assert all(any(kind in name for kind in kinds) for name in names)


def test_first_matching_pattern_gives_the_factor(model: Pi05) -> None:
    groups = param_groups(model.named_parameters(), RECIPE)
    factor = {id(p): group["lr_factors"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert factor[id(names["backbone.layers.0.mlp.up_proj.weight"])] == (0.1, 1.0)
    assert factor[id(names["backbone.layers.1.mlp.up_proj.weight"])] == (0.5, 1.0)
    assert factor[id(names["flow_head.action_in_proj.weight"])] == (1.0, 2.0)
    assert all(factor[id(p)][0] == 0 for name, p in names.items() if name.startswith("backbone.vision"))


def test_every_parameter_belongs_to_one_part_of_the_gradient_norms(model: Pi05) -> None:
    assert all(sum(bool(re.search(p, name)) for p in PARTS.values()) == 1 for name, _ in model.named_parameters())


def test_gradient_norms_are_those_of_the_parts() -> None:
    model = small_model()
    batch = make_batch(model.config, ["iippss", "ptt"], acting=1)
    out = model(batch)
    (token_nll(out).mean() + out["flow"].values.mean()).backward()
    norms = gradient_norms(model.named_parameters())

    def by_hand(*prefixes: str) -> torch.Tensor:
        return torch.cat(
            [p.grad.flatten() for n, p in model.named_parameters() if n.startswith(prefixes) and p.grad is not None]
        ).norm()

    for part, prefix in {"vision": "backbone.vision.", "flow": "flow_head.", "total": ""}.items():
        torch.testing.assert_close(norms[part], by_hand(prefix), rtol=1e-5, atol=0)
    parts = torch.stack([norms["vision"], norms["language"], norms["flow"]])
    torch.testing.assert_close(parts.norm(), norms["total"], rtol=1e-5, atol=0)


def backward_flops(*frozen: str, insulate: bool = False) -> int:
    model = small_model(small_config(depth=3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(frozen)
    batch = make_batch(model.config, ["iipp", "ipp"], acting=2)
    loss = model(batch, ["flow"], insulate=insulate)["flow"].values.mean()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_backward_of_a_frozen_backbone_is_that_of_the_flow_head_alone() -> None:
    # insulated, the flow loss does not reach the backbone at all
    assert backward_flops("backbone.") <= backward_flops(insulate=True) < 0.6 * backward_flops()


def test_frozen_vision_costs_no_backward() -> None:
    assert backward_flops("backbone.vision.") < backward_flops()


def test_frozen_lowest_layers_cost_no_backward_below_the_first_that_is_trained() -> None:
    lower = "backbone.vision.", "backbone.embed_tokens.", "backbone.layers.0."
    assert backward_flops(*lower) < backward_flops(*lower[:2]) < backward_flops()


class FlowGradients(Callback):
    """Whether the backbone has a gradient, in each step."""

    def __init__(self) -> None:
        self.reach_backbone: list[bool] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for name, p in pl_module.named_parameters() if ".backbone." in name and p.grad is not None]
        self.reach_backbone.append(any(bool(gradient.any()) for gradient in gradients))


@pytest.mark.parametrize("insulated", [True, False])
def test_knowledge_insulation_is_what_the_module_is_told(train: Callable[..., Trainer], insulated: bool) -> None:
    flow_alone = StageOptions(LossWeights(flow=1), {"robot/continuous_robot_actions": 1.0})
    gradients = FlowGradients()
    train(
        gradients,
        stages={"pretrain": flow_alone, "posttrain": flow_alone},
        module_options={"knowledge_insulation": insulated},
        limit_val_batches=0,
    )
    # a new expert looks at the backbone from its second step on
    assert any(gradients.reach_backbone) is not insulated
