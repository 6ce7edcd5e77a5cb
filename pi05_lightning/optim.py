"""Optimizer groups: one place that decides what decays and at which rate each parameter learns in each stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pi05_lightning.files.ranges import check_range
from pi05_lightning.recipe import Recipe

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]

NO_DECAY = r"(^|\.)bias$|norm|embed_tokens|position_embedding|identity$"


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of parameters that share their decay and their learning-rate factor in every stage; they partition all.

    A group carries `name`, `param_names`, `lr_factors` (one per stage), and `weight_decay` 0 where nothing is to decay.
    """
    groups: dict[tuple[bool, tuple[float, ...]], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        decays = parameter.ndim > 1 and not re.search(NO_DECAY, name)
        factors = tuple(stage.lr_factor(name) for stage in recipe.stages)
        key = (decays, factors)
        if key not in groups:
            label = "_".join(["decay" if decays else "no_decay", *(f"x{factor:g}" for factor in factors)])
            groups[key] = {"name": label, "params": [], "param_names": [], "lr_factors": factors}
            if not decays:
                groups[key]["weight_decay"] = 0.0
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    return list(groups.values())


class StageSchedule(LambdaLR):
    """Each group's learning rate as a pure function of the step: its stage's factor × warm-up and cosine."""

    def __init__(self, optimizer: Optimizer, recipe: Recipe) -> None:
        def factor(group: dict[str, Any]) -> Callable[[int], float]:
            return lambda step: group["lr_factors"][recipe.number(step)] * recipe.schedule(step)

        super().__init__(optimizer, [factor(group) for group in optimizer.param_groups])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after as many steps, at the rates of this schedule; upstream's go on at those of the saved one."""
        own = {"base_lrs": self.base_lrs, "lr_lambdas": [None] * len(self.lr_lambdas)}
        super().load_state_dict(state_dict | own)
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [rate * factor for rate, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # as torchao's optimizers compile it in
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def check_optimizer(make: Callable[[Any], Optimizer]) -> None:
    """Make an optimizer of nothing much. Raises ValueError for arguments that it, or common sense, does not take."""
    try:
        options = make([nn.Parameter(torch.zeros(1))]).defaults
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer: {error}") from error
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if isinstance(options.get(name), int | float):
            check_range(f"model.optimizer's {name}", options[name], 0)
