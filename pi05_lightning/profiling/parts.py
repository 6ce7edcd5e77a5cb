"""What a training step and a chunk cost, part by part: FLOPs and bytes counted, memory tracked, seconds measured.

The graph is cut between the parts, so that each part's backward pass runs, and is booked, by itself. Counting runs on
the meta device and tracking on fake tensors: no size of model needs memory for either.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Prefix, Target, index_targets

PARTS = ("vision", "language model", "logits", "action expert")


@dataclass(frozen=True)
class Work:
    """One step's data: observations, cameras, prompt tokens, tokens to predict, and noise draws."""

    batch_size: int = 1
    cameras: int = 2
    prompt_tokens: int = 60
    target_tokens: int = 0
    draws: int = 1
    insulate: bool = False
    """The flow loss gives the backbone no gradient."""

    def batch(self, config: ModelConfig, device: torch.device | str = "cpu") -> Batch:
        """Random data of this size on a device."""
        rows, length, size = self.batch_size, self.prompt_tokens + self.target_tokens, config.vision.image_size
        is_target = torch.arange(length) >= self.prompt_tokens
        camera = torch.arange(self.cameras).repeat(rows)
        target_kind = (is_target * int(Target.FAST)).to(torch.uint8).expand(rows, -1)
        actions = torch.randn(rows, config.horizon, config.action_dim)
        batch = Batch(
            pixels=torch.randint(0, 256, (rows * self.cameras, 3, size, size), dtype=torch.uint8),
            image_index=torch.arange(rows * self.cameras),
            camera=camera,
            image_mask=torch.ones(rows, self.cameras, dtype=torch.bool),
            tokens=torch.randint(config.vocab_size, (rows, length)),
            token_mask=torch.ones(rows, length, dtype=torch.bool),
            causal=is_target.expand(rows, -1),
            target_kind=target_kind,
            target_index=index_targets(target_kind),
            actions=actions,
            action_mask=torch.ones_like(actions, dtype=torch.bool),
            key=torch.arange(rows),
            noise=torch.randn(rows, self.draws, config.horizon, config.action_dim),
            time=torch.rand(rows, self.draws),
        )
        return batch.to(device)


class Book:
    """Whatever is measured, booked to the part that is running; parts may be entered inside another."""

    def __init__(self) -> None:
        self._running: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    def enter(self, name: str) -> None:
        self._running.append(name)

    def leave(self) -> None:
        self._running.pop()


class Counter(Book, TorchDispatchMode):
    """FLOPs of matrix products, and bytes that operations read and write, if none were fused."""

    def __init__(self) -> None:
        Book.__init__(self)
        TorchDispatchMode.__init__(self)
        self.flops = dict.fromkeys(PARTS, 0)
        self.bytes = dict.fromkeys(PARTS, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._running:
            part = self._running[-1]
            if func.overloadpacket in flop_registry:
                self.flops[part] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            if not func.is_view:
                self.bytes[part] += sum(x.nbytes for x in tree_iter((args, kwargs, out)) if isinstance(x, Tensor))
        return out


class Clock(Book):
    """Seconds on this machine."""

    def __init__(self, synchronize: Callable[[], object]) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronize, self._since = synchronize, 0.0

    def enter(self, name: str) -> None:
        self._book()
        super().enter(name)

    def leave(self) -> None:
        self._book()
        super().leave()

    def _book(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def training_step(model: Pi05, batch: Batch, work: Work, book: Book) -> None:
    """Forward and backward, the graph cut between the parts."""
    assert batch.noise is not None
    assert batch.time is not None
    vision, language = _Seam(), _Seam()
    with _booked_vision(model, book, vision.cut), book.part("language model"):
        whole = model.backbone(batch, need_hidden=bool(work.target_tokens))
    prefix: Prefix = replace(
        whole,
        hidden=None if whole.hidden is None else language.cut(whole.hidden),
        kv=[(language.cut(k), language.cut(v)) for k, v in whole.kv],
    )
    if prefix.hidden is not None:
        with book.part("logits"):
            model.fast_head.loss(batch, prefix, model.backbone)["fast"].values.mean().backward()
    with book.part("action expert"):
        seen = prefix.detach() if work.insulate else prefix
        model.flow_head.loss(batch, seen, model.backbone)["flow"].values.mean().backward()
    with book.part("language model"):
        language.backward()
    with book.part("vision"):
        vision.backward()


class _Seam:
    """Where the graph is cut: what flowed in, and the leaves that went on in its place."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def cut(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        self._pairs.append((x, x.detach().requires_grad_()))
        return self._pairs[-1][1]

    def backward(self) -> None:
        """Go on with the gradients that came back to the leaves; nothing where none did."""
        used = [(x, leaf.grad) for x, leaf in self._pairs if leaf.grad is not None]
        if used:
            torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])


@torch.no_grad()
def chunk(model: Pi05, batch: Batch, num_steps: int, book: Book) -> None:
    """One action chunk per observation."""
    assert batch.noise is not None
    with _booked_vision(model, book, lambda x: x), book.part("language model"):
        prefix = model.backbone(batch, need_hidden=False)
    with book.part("action expert"):
        model.flow_head.sample(prefix, batch.noise[:, :1], num_steps)


@contextmanager
def _booked_vision(model: Pi05, book: Book, cut: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def enter(module: nn.Module, args: Any) -> None:
        book.enter("vision")

    def leave(module: nn.Module, args: Any, out: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        book.leave()
        return cut(out[0]), out[1]

    handles = [
        model.backbone.vision.register_forward_pre_hook(enter),
        model.backbone.vision.register_forward_hook(leave),
    ]
    yield
    for handle in handles:
        handle.remove()


def parameters_of(model: Pi05) -> dict[str, list[nn.Parameter]]:
    """Parameters by part; the embedding is the logits' too, and is booked there."""
    vision = list(model.backbone.vision.parameters())
    embedding = list(model.backbone.embed_tokens.parameters())
    expert = list(model.flow_head.parameters())
    others = {id(p) for p in (*vision, *embedding, *expert)}
    language = [p for p in model.parameters() if id(p) not in others]
    return dict(zip(PARTS, (vision, language, embedding, expert), strict=True))


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
