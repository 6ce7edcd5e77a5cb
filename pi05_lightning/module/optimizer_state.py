"""A checkpoint's state of the optimizer, by the names of parameters, under options that may be others today."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pi05_lightning.optim import MakeOptimizer
from pi05_lightning.weights.resumed import REMEDY

MADE_WITH = "made_with"
"""What a group of an optimizer keeps of its class and options as they were when it was made."""
_NO_OPTIONS = {"params", "param_names", "name", "lr_factors", "initial_lr", MADE_WITH}


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
