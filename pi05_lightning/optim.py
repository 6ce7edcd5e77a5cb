"""Optimizer groups: one place that decides what decays and at which rate each parameter learns in each stage.

Also the norms of gradients by part, as they are before clipping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pi05_lightning.files.ranges import check
from pi05_lightning.recipe import Recipe

NO_DECAY = r"(^|\.)bias$|norm|embed_tokens|position_embedding|identity$"


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of parameters that share their decay and their learning-rate factor in every stage; they partition all.

    A group carries `name`, `lr_factors` (one per stage), and `weight_decay` 0 where nothing is to decay.
    """
    groups: dict[tuple[bool, tuple[float, ...]], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        decays = parameter.ndim > 1 and not re.search(NO_DECAY, name)
        factors = tuple(stage.lr_factor(name) for stage in recipe.stages)
        key = (decays, factors)
        if key not in groups:
            label = "_".join(["decay" if decays else "no_decay", *(f"x{factor:g}" for factor in factors)])
            groups[key] = {"name": label, "params": [], "lr_factors": factors}
            if not decays:
                groups[key]["weight_decay"] = 0.0
        groups[key]["params"].append(parameter)
    return list(groups.values())


def stage_schedule(optimizer: Optimizer, recipe: Recipe) -> LambdaLR:
    """Each group's learning rate as a pure function of the step: its stage's factor × warm-up and cosine."""

    def factor(group: dict[str, Any]):
        return lambda step: group["lr_factors"][recipe.number(step)] * recipe.schedule(step)

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])


def check_optimizer(make: Callable[[Any], Optimizer]) -> None:
    """Make an optimizer of nothing much. Raises ValueError for arguments that it, or common sense, does not take."""
    try:
        options = make([nn.Parameter(torch.zeros(1))]).defaults
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer: {error}") from error
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if isinstance(options.get(name), int | float):
            check(f"model.optimizer's {name}", options[name], 0)


PARTS = {
    "vision": r"^backbone\.vision\.",
    "language": r"^backbone\.(?!vision\.)",
    "flow": r"^flow_head\.",
    "auxiliary": r"^auxiliary\.",
}
"""What gradient norms are told apart by; the subtask and FAST heads have no parameters of their own."""


def gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each part that has one, and of all, as scalars on the device."""
    gradients = {name: parameter.grad for name, parameter in named_parameters if parameter.grad is not None}
    parts = {part: [g for name, g in gradients.items() if re.search(pattern, name)] for part, pattern in PARTS.items()}
    parts["total"] = list(gradients.values())
    return {part: nn.utils.get_total_norm(own) for part, own in parts.items() if own}
