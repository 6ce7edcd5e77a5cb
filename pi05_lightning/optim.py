"""Optimizer groups: one place that decides what decays and at which rate each parameter learns in each stage.

Also what becomes of a checkpoint's state under other options, and the norms of gradients by part, before clipping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pi05_lightning.files.ranges import check_range
from pi05_lightning.recipe import Recipe
from pi05_lightning.weights.resumed import REMEDY

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


MADE_WITH = "made_with"
"""What a group of an optimizer keeps of its class and options as they were when it was made."""
_NO_OPTIONS = {"params", "param_names", "name", "lr_factors", "initial_lr", MADE_WITH}

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


def resumable(make: MakeOptimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of `param_groups`, which takes a checkpoint's state by the names of parameters, see `_carried_on`.

    What it is told today counts: rates, decay, moments' rates and grouping may be others than in the checkpoint.
    """
    optimizer = make(groups)
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    for group in optimizer.param_groups:
        group[MADE_WITH] = _options(group) | {"class": kind}
    optimizer.register_load_state_dict_pre_hook(partial(_carried_on, make))
    return optimizer


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """As numbers, where they are tensors that change as it trains, such as torchao's rates."""
    return {
        key: value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
        for key, value in group.items()
        if key not in _NO_OPTIONS
    }


def _carried_on(make: MakeOptimizer, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state as this optimizer can load it: each parameter's own state, in today's groups with their options.

    An option that is what it was keeps its saved value, which an optimizer may have changed since. A parameter that was
    not trained yet begins without a state.  ValueError for another class of optimizer, options that need a state which
    was not saved, and groups that changed since a checkpoint without names.
    """
    place = _places(optimizer, saved["param_groups"])
    numbers: dict[int, int] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        first = sum(len(other["params"]) for other in groups)
        before = [place.get(name, (None, None)) for name in group["param_names"]]
        then = next((found for found, _ in before if found is not None), {})
        made = then.get(MADE_WITH, {})
        changed = {key for key, value in group[MADE_WITH].items() if key not in made or not _same(made[key], value)}
        # an older checkpoint does not say its class, whose options another one does not have
        foreign = [] if made else sorted(_options(then).keys() - group.keys())
        if foreign or (made and "class" in changed):
            other = made.get("class", f"one with {', '.join(foreign)}")
            raise ValueError(
                f"model.optimizer is {group[MADE_WITH]['class']}, and {other} in the checkpoint, whose state it"
                f" cannot use. {REMEDY}"
            )
        own = {n: first + i for i, (_, n) in enumerate(before) if n in saved["state"] and n is not None}
        if changed and own:
            number, index = next(iter(own.items()))
            _check_state(make, group, index - first, saved["state"][number])
        kept = {key: value for key, value in then.items() if key not in _NO_OPTIONS | changed}
        groups.append(group | kept | {"params": list(range(first, first + len(before)))})
        numbers |= own
    # in the order that it was saved in, by which the next checkpoint is the same file
    state = {numbers[n]: kept for n, kept in saved["state"].items() if n in numbers}
    return saved | {"param_groups": groups, "state": state}


def _places(optimizer: Optimizer, saved: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], int]]:
    """The saved group of each parameter, and its number there, by name."""
    groups = optimizer.param_groups
    named = all("param_names" in group for group in saved)  # older checkpoints are not
    if not named and [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise ValueError(
            "freeze, lr_factors or the stages have changed the groups of parameters, and the checkpoint is older than"
            f" the names by which its optimizer's state could be told apart. {REMEDY}"
        )
    return {
        name: (group, number)
        for group, today in zip(saved, saved if named else groups, strict=True)
        for name, number in zip(today["param_names"], group["params"], strict=True)
    }


def _check_state(make: MakeOptimizer, group: dict[str, Any], index: int, state: dict[str, Any]) -> None:
    """ValueError where a parameter's saved state lacks what the group's options need, as `amsgrad` does."""
    parameter = group["params"][index]
    small = nn.Parameter(torch.zeros([1] * parameter.ndim, dtype=parameter.dtype, device=parameter.device))
    small.grad = torch.zeros_like(small)
    trial = make([_options(group) | {"params": [small]}])
    trial.step()
    if missing := trial.state[small].keys() - state.keys():
        raise ValueError(
            f"model.optimizer has options now that need {', '.join(sorted(missing))} of each parameter, which the"
            f" checkpoint does not have. {REMEDY}"
        )


def _same(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def check_optimizer(make: Callable[[Any], Optimizer]) -> None:
    """Make an optimizer of nothing much. Raises ValueError for arguments that it, or common sense, does not take."""
    try:
        options = make([nn.Parameter(torch.zeros(1))]).defaults
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer: {error}") from error
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if isinstance(options.get(name), int | float):
            check_range(f"model.optimizer's {name}", options[name], 0)


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
    norms = {part: nn.utils.get_total_norm(own) for part, own in parts.items() if own}
    return {part: norm.full_tensor() if isinstance(norm, DTensor) else norm for part, norm in norms.items()}
