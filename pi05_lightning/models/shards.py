"""Parameters that are divided between ranks (DTensors): whole for a moment, and the slice that a rank keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its slice, or all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slice_of(whole: Tensor, like: DTensor) -> Tensor:
    """The part of a whole tensor that this rank holds of one divided `like` it: a view, of which nothing is read."""
    place = like.device_mesh.get_coordinate()
    assert place is not None
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            # as `torch.chunk` divides: the last ranks may have less, or nothing
            parts = whole.chunk(like.device_mesh.size(axis), placement.dim)
            whole = parts[place[axis]] if place[axis] < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def rows_of(tensor: Tensor) -> range:
    """Which rows of a tensor this rank holds."""
    rows = torch.arange(tensor.shape[0])
    own = slice_of(rows, tensor) if isinstance(tensor, DTensor) else rows
    return range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0)


@contextmanager
def whole(module: nn.Module, *, gather: bool = False) -> Iterator[None]:
    """Within it the parameters of a module are whole, on every rank; of what they are then, each keeps its slice.

    gather: they begin with their values, and every rank must enter it; else with anything. Does nothing to parameters
    that are not divided.
    """
    divided = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for part, name, parameter in divided:
        values = parameter.full_tensor().detach() if gather else own_part(parameter.detach()).new_empty(parameter.shape)
        setattr(part, name, nn.Parameter(values, parameter.requires_grad))
    try:
        yield
    finally:
        for part, name, parameter in divided:
            own_part(parameter.detach()).copy_(slice_of(getattr(part, name).detach(), parameter))
            setattr(part, name, parameter)
