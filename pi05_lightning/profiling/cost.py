"""What a training step and a chunk cost, component by component: FLOPs and bytes counted, seconds measured.

The model's own code runs. In the forward pass, hooks on its modules say whose turn it is. In the backward pass, each
node of the graph does: it belongs to the first component, in the order of the forward pass, whose output leads back to
it. Modules alone would not do: PyTorch's `FlopCounterMode` and `ModuleTracker` take a module whose input needs no
gradient for running until the end of the backward pass. Counting runs on the meta device, where no size of model needs
memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.profiling.rate import wait_for
from pi05_lightning.profiling.step import training_loss
from pi05_lightning.types import Batch

COMPONENTS = ("vision", "language model", "logits", "action expert")
"""`logits` is what no module does: the scores of the tokens to predict, and the losses."""


class Meter:
    """Measures something of the component whose turn it is."""

    component: str | None = None

    def enter(self, component: str | None) -> None:
        """From now on it is this component's turn; with None, nobody's."""
        self.component = component


class CostCounter(Meter, TorchDispatchMode):
    """FLOPs of matrix products, as `FlopCounterMode` counts them, and bytes that operations read and write unfused."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = dict.fromkeys(COMPONENTS, 0)
        self.bytes = dict.fromkeys(COMPONENTS, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.component is not None:
            if func.overloadpacket in flop_registry:
                self.flops[self.component] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            if not func.is_view:
                tensors = (x for x in tree_iter((args, kwargs, out)) if isinstance(x, Tensor))
                self.bytes[self.component] += sum(x.nbytes for x in tensors)
        return out


class Stopwatch(Meter):
    """Seconds on a device, which is waited for whenever the turn changes."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(COMPONENTS, 0.0)
        self._device, self._since = device, 0.0

    def enter(self, component: str | None) -> None:
        if component == self.component:
            return
        wait_for(self._device)
        now = time.perf_counter()
        if self.component is not None:
            self.seconds[self.component] += now - self._since
        self.component, self._since = component, now


def measure_training_step(model: Pi05, batch: Batch, insulate: bool, meter: Meter) -> None:
    """Forward and backward."""
    with _following(model, meter) as outputs:
        meter.enter("logits")
        loss = training_loss(model, batch, insulate)
        meter.enter(None)
        for component, node in _nodes(outputs, loss):
            node.register_prehook(lambda _, component=component: meter.enter(component))
        loss.backward()
        meter.enter(None)


@torch.no_grad()
def measure_chunk(model: Pi05, batch: Batch, num_steps: int, meter: Meter) -> None:
    """One action chunk per observation."""
    assert batch.noise is not None
    with _following(model, meter):
        prefix = model.backbone(batch, need_hidden=False)
        meter.enter("action expert")
        model.flow_head.sample(prefix, batch.noise[:, :1], num_steps)
        meter.enter(None)


Outputs = dict[str, list[Tensor]]
"""component -> what its module returned"""


@contextmanager
def _following(model: Pi05, meter: Meter) -> Iterator[Outputs]:
    """Within it the meter is told of every module that begins, and of the components that end."""
    backbone, expert = model.backbone, model.flow_head
    owner: dict[nn.Module, str] = {
        **dict.fromkeys(backbone.modules(), "language model"),
        **dict.fromkeys(backbone.vision.modules(), "vision"),
        **dict.fromkeys(expert.modules(), "action expert"),
    }
    after: dict[nn.Module, str] = {backbone.vision: "language model", backbone: "logits", expert: "logits"}
    outputs: Outputs = {"vision": [], "language model": [], "action expert": []}  # in the order of `_nodes`

    def begin(module: nn.Module, args: Any) -> None:
        if module in owner:
            meter.enter(owner[module])

    def end(module: nn.Module, args: Any, out: Any) -> None:
        if module in after:
            fields = vars(out) if is_dataclass(out) else out  # of a prefix
            outputs[owner[module]] += [x for x in tree_iter(fields) if isinstance(x, Tensor)]
            meter.enter(after[module])

    hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(end)
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _nodes(outputs: Outputs, loss: Tensor) -> Iterator[tuple[str, Node]]:
    """Every node of a loss's graph with its component, the first one whose output leads back to it."""
    seen: set[Node] = set()
    for component, tensors in (*outputs.items(), ("logits", [loss])):
        waiting = [x.grad_fn for x in tensors if x.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                yield component, node
                waiting += [found for found, _ in node.next_functions if found is not None]


def parameters_of(model: Pi05) -> dict[str, list[nn.Parameter]]:
    """Parameters by component; the embedding is the logits' too, and is booked there."""
    vision = list(model.backbone.vision.parameters())
    embedding = list(model.backbone.embed_tokens.parameters())
    expert = list(model.flow_head.parameters())
    others = {id(p) for p in (*vision, *embedding, *expert)}
    language = [p for p in model.parameters() if id(p) not in others]
    return dict(zip(COMPONENTS, (vision, language, embedding, expert), strict=True))
