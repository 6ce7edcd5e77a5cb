from collections import Counter

import pytest
import torch

from pi05_lightning.optim import StageSchedule, param_groups
from pi05_lightning.recipe import LossWeights, Recipe, Stage, StageOptions


def test_stage_changes_at_exactly_the_threshold() -> None:
    recipe = Recipe.of(pretrain_steps=3, posttrain_steps=2)
    assert [recipe.at(step).name for step in range(5)] == ["pretrain"] * 3 + ["posttrain"] * 2


def test_steps_are_counted_by_stage_and_those_past_the_end_with_the_last() -> None:
    recipe = Recipe.of(3, 2, then=[Stage(name="third", steps=0)])
    for first in range(7):
        for end in range(8):
            each = Counter(recipe.at(step).name for step in range(first, end))
            assert {stage.name: steps for stage, steps in recipe.between(first, end)} == each


def test_flow_alpha_scales_the_flow_term_of_the_posttrain_stage_only() -> None:
    joint = StageOptions(losses=LossWeights(fast=1.0, flow=0.5))
    recipe = Recipe.of(1, 1, flow_alpha=10.0, pretrain=joint, posttrain=joint)
    assert recipe.at(0).weights == {"fast": 1.0, "flow": 0.5}
    assert recipe.at(1).weights == {"fast": 1.0, "flow": 5.0}


def test_each_stage_warms_up_and_decays_by_itself() -> None:
    stage = StageOptions(warmup_steps=2, final_lr_factor=0.1)
    recipe = Recipe.of(10, 10, pretrain=stage, posttrain=stage)
    factors = [recipe.schedule(step) for step in range(20)]
    assert factors[:10] == factors[10:]
    assert factors[0] == 0.5
    assert max(factors[:10]) == factors[2] == 1.0
    assert factors[9] < 0.15


def test_a_recipe_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no steps"):
        Recipe.of(pretrain_steps=0, posttrain_steps=0)


@pytest.mark.parametrize("name", ["total", "a/b"])
def test_a_stage_whose_name_would_hide_other_curves_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"a stage's name is '{name}'"):
        Stage(name=name, steps=1)


def test_negative_loss_weight_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="text"):
        LossWeights(text=-1.0)


@pytest.fixture
def network() -> torch.nn.Module:
    return torch.nn.ModuleDict(
        {"backbone": torch.nn.Linear(2, 2), "norm": torch.nn.LayerNorm(2), "head": torch.nn.Linear(2, 2)}
    )


def test_groups_partition_the_parameters(network: torch.nn.Module) -> None:
    recipe = Recipe.of(pretrain=StageOptions(freeze=("backbone",)), posttrain=StageOptions(lr_factors={"head": 0.5}))
    grouped = [p for group in param_groups(network.named_parameters(), recipe) for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(network.parameters()))


def test_a_factor_of_0_freezes() -> None:
    stage = Recipe.of(pretrain=StageOptions(lr_factors={"backbone": 0.0, "head": 0.5})).stages[0]
    assert [stage.freezes(name) for name in ("backbone.weight", "head.weight", "norm.weight")] == [True, False, False]


def test_norms_and_biases_do_not_decay(network: torch.nn.Module) -> None:
    groups = param_groups(network.named_parameters(), Recipe.of())
    undecayed = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    expected = {id(p) for name, p in network.named_parameters() if name.endswith("bias") or "norm" in name}
    assert undecayed == expected


def test_learning_rate_follows_each_groups_factor_of_the_stage(network: torch.nn.Module) -> None:
    pretrain = StageOptions(freeze=("head",), final_lr_factor=1.0)
    posttrain = StageOptions(lr_factors={"head": 0.5}, final_lr_factor=1.0)
    recipe = Recipe.of(1, 2, pretrain=pretrain, posttrain=posttrain)
    optimizer = torch.optim.SGD(param_groups(network.named_parameters(), recipe), lr=1.0)
    schedule = StageSchedule(optimizer, recipe)

    def rate(name: str) -> float:
        parameter = dict(network.named_parameters())[name]
        return next(g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))

    assert (rate("head.weight"), rate("backbone.weight")) == (0.0, 1.0)
    optimizer.step()
    schedule.step()
    assert (rate("head.weight"), rate("backbone.weight")) == (0.5, 1.0)
