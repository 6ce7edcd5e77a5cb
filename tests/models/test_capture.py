"""What a CUDA graph can capture: no value goes from the device to the host or back. Run on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi05_lightning.models.capture import padded
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch

from .small import make_batch, small_config, small_model


class NothingCrosses(TorchDispatchMode):
    """Raises where an operation has tensors of two devices, which is a copy; zero-dimensional ones are arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.ndim}
        assert len(devices) <= 1, f"{func} copies between {devices}"
        return out


def on_fake_cuda(use: Callable[[Pi05, Batch], object], rows: tuple[str, str] = ("iipp", "ipppp")) -> None:
    config = small_config()
    batch = make_batch(config, rows, acting=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = Pi05(config)
        on_device = batch.to("cuda")
        with NothingCrosses():
            use(model, on_device)


@torch.no_grad()
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("continued", [False, True])
def test_a_chunk_is_computed_without_the_host(draws: int, continued: bool) -> None:
    def chunk(model: Pi05, batch: Batch) -> None:
        prefix = model.backbone(padded(batch), need_hidden=False)
        given = (batch.actions, torch.ones(2, dtype=torch.long, device="cuda")) if continued else (None, None)
        noise = torch.randn(2, draws, model.config.horizon, model.config.action_dim, device="cuda")
        assert model.flow_head.sample(prefix, noise, 4, *given).device.type == "cuda"

    on_fake_cuda(chunk)


@torch.no_grad()
def test_a_prompt_padded_for_a_graph_gives_the_same_chunk() -> None:
    model = small_model()
    batch = make_batch(model.config, ["iipp", "ip"])
    longer = padded(batch)
    assert longer.tokens.shape == (2, 16)
    assert padded(longer).tokens.shape == (2, 16)
    noise = torch.randn(2, model.config.horizon, model.config.action_dim)
    torch.testing.assert_close(model.chunk(longer, noise), model.chunk(batch, noise))


def test_losses_are_computed_without_the_host() -> None:
    on_fake_cuda(lambda model, batch: model(batch), rows=("iippss", "iptff"))


def test_what_a_graph_cannot_capture_is_noticed() -> None:
    with pytest.raises(DataDependentOutputException):
        on_fake_cuda(lambda model, batch: batch.actions.sum().item())
    with pytest.raises(AssertionError, match="copies between"):
        on_fake_cuda(lambda model, batch: torch.tensor([1.0, 2.0], device="cuda"))
    with pytest.raises(AssertionError, match="copies between"):
        on_fake_cuda(lambda model, batch: batch.actions.cpu())
