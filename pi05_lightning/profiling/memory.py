"""The memory that a training step needs beside its weights, by PyTorch's tracker on fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.weak import WeakIdKeyDictionary


def activation_peak(model: nn.Module, step: Callable[[], None], fake: FakeTensorMode) -> int:
    """The most bytes that a step holds beside parameters and their gradients, by PyTorch's tracker on fake tensors.

    model: on the meta device; it is made fake.  step: forward and backward, with fake inputs.  A parameter's gradient
    goes as soon as it is there; the embedding's, large in a moment when little else is left, is not made.
    """
    with fake:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                made = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                made.register_post_accumulate_grad_hook(_drop_gradient)
                setattr(module, name, made)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, args, out: out.detach())
        tracker = MemTracker()
        tracker.memory_tracking = _NoPeaksPerModule()
        tracker.track_external(model)
        with tracker, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Expected a tensor or a traceable wrapper")  # arguments that are None
            step()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] - sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


class _NoPeaksPerModule(WeakIdKeyDictionary):
    """What the tracker keeps of modules; it asks each of them at every operation, for peaks that nobody reads here."""

    def values(self) -> list[Any]:  # type: ignore[override]
        return []


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
