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


def slice_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of one divided `like` it: a view, of which nothing is read."""
    if not isinstance(like, DTensor):
        return whole
    place = like.device_mesh.get_coordinate()
    assert place is not None
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            # as `torch.chunk` divides, which torchao's tensors lack: the last ranks may have less, or nothing
            size = whole.shape[placement.dim]
            most = -(-size // like.device_mesh.size(axis))
            start = min(place[axis] * most, size)
            whole = whole.narrow(placement.dim, start, min(most, size - start))
    return whole


def rows_of(tensor: Tensor) -> range:
    """Which rows of a tensor this rank holds."""
    own = slice_of(torch.arange(tensor.shape[0]), tensor)
    return range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0)


@contextmanager
def unsharded(module: nn.Module, *, gather: bool = False) -> Iterator[None]:
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
