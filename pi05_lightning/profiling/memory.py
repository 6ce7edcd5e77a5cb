"""The memory that a training step needs, tracked on fake tensors: no size of model needs any for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class StepMemory:
    """What a training step holds beside the weights and what is kept from step to step, in bytes."""

    gradients: Mapping[str, int]
    """Of the parameters that get one, by name."""
    activations: int
    """The most that is held beside weights and all of the gradients at once."""


def step_memory(
    model: nn.Module, forward: Callable[[], Tensor], fake: FakeTensorMode, *, accumulates: bool = False
) -> StepMemory:
    """Count a step as Lightning takes it: the last step's gradients stay until the forward pass is over.

    model: fake (`make_fake`), frozen as it will be.  forward: fake inputs to a loss.
    accumulates: gradients of the batches before stay in the backward pass too.
    """
    gradients: dict[str, int] = {}
    hooks = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:

            def met(parameter: Tensor, name: str = name) -> None:
                assert parameter.grad is not None
                gradients[name] = parameter.grad.nbytes
                if accumulates:
                    parameter.grad = None

            hooks.append(parameter.register_post_accumulate_grad_hook(met))
    weights = [*model.parameters(), *model.buffers()]
    try:
        with fake, tracking(weights) as peak:
            loss = forward()
            before = peak()
            if loss.requires_grad:
                loss.backward()
            over = peak()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    kept = sum(gradients.values())
    most = max(before, over) if accumulates else max(before, over - kept)
    return StepMemory(gradients, most - bytes_of(weights))


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer keeps and needs, in bytes."""

    state: Mapping[str, int]
    """Of each parameter, by name."""
    temporary: int
    """The most that a step holds beside parameters, gradients and state."""


TRIAL = (64, 256)
"""Of a parameter that an optimizer steps on for real, where it looks at values that fake tensors do not have."""


def optimizer_memory(
    named: Mapping[str, nn.Parameter], make: Callable[[Mapping[str, nn.Parameter]], Optimizer], fake: FakeTensorMode
) -> OptimizerMemory:
    """Count two steps, the first of which makes the state. named: fake parameters, all of which have gradients then."""
    try:
        with fake:
            for parameter in named.values():
                parameter.grad = torch.empty_like(parameter)
            optimizer = make(named)
            if not type(optimizer).__module__.startswith("torch.optim."):
                return OptimizerMemory(_state_by_trial(named, make), 0)
            optimizer.step()
            state = {name: bytes_of(optimizer.state[value]) for name, value in named.items()}
            held = [*named.values(), *(parameter.grad for parameter in named.values())]
            with tracking(held, [optimizer.state[value] for value in named.values()]) as peak:
                optimizer.step()
                return OptimizerMemory(state, peak() - bytes_of(held) - sum(state.values()))
    except DataDependentOutputException:  # Adafactor looks at its parameters
        return OptimizerMemory(_state_by_trial(named, make), 0)
    finally:
        for parameter in named.values():
            parameter.grad = None


def _state_by_trial(
    named: Mapping[str, nn.Parameter], make: Callable[[Mapping[str, nn.Parameter]], Optimizer]
) -> dict[str, int]:
    """State per value as it is for a small parameter of the same type, after a real step."""
    shares: dict[torch.dtype, float] = {}
    with unset_fake_temporarily(), torch.compiler.set_stance("force_eager"):
        for dtype in {parameter.dtype for parameter in named.values()}:
            trial = nn.Parameter(torch.zeros(TRIAL, dtype=dtype))
            trial.grad = torch.zeros_like(trial)
            optimizer = make({"weight": trial})
            optimizer.step()
            shares[dtype] = bytes_of(optimizer.state[trial]) / trial.numel()
    return {name: round(shares[value.dtype] * value.numel()) for name, value in named.items()}


def make_fake(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
    """Give a model on the meta device parameters and buffers that claim memory on a device, and have none."""
    with fake:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                own = parameter.dtype
                made = torch.empty(
                    parameter.shape, dtype=dtype if dtype and own.is_floating_point else own, device=device
                )
                setattr(module, name, nn.Parameter(made, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


@contextmanager
def tracking(*held: object) -> Iterator[Callable[[], int]]:
    """Within it, the most bytes that were held at once so far, with what is held from before."""
    tracker = Held()
    for tensors in held:
        tracker.saw(tensors)
    with tracker:
        yield lambda: tracker.peak


class Held(TorchDispatchMode):
    """Counts the bytes of storages from the operation that makes them until they go.

    PyTorch's own tracker of memory hooks the gradient of every parameter, and refuses those that are frozen. As
    that does, this one hooks the resizing of storages, by which FSDP gives memory back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            if storage._cdata in self._storages:
                self._count(storage._cdata, storage.nbytes())

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def saw(self, values: object) -> None:
        for tensor in parts_of(values):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._count(storage._cdata, storage.nbytes())
                finalize(storage, self._count, storage._cdata, None)

    def _count(self, key: int, size: int | None) -> None:
        """A storage has so many bytes now; None: it is gone."""
        self.now += (size or 0) - self._storages.pop(key, 0)
        if size is not None:
            self._storages[key] = size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.saw(out)
        return out


def parts_of(values: object) -> Iterator[Tensor]:
    """The tensors among some values; of a quantised one, its parts."""
    for value in tree_iter(values):
        if is_traceable_wrapper_subclass(value):
            yield from parts_of([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
            yield value


def bytes_of(values: object) -> int:
    return sum(tensor.nbytes for tensor in parts_of(values))
