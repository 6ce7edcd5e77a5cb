"""Products in oneDNN: the same values, gradients and FLOPs as `nn.Linear`, for small ones too where all go there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.models import kernels as module
from pi05_lightning.models.kernels import Linear, linear, linear_gelu

pytestmark = pytest.mark.skipif(not module.DTYPES, reason="oneDNN's products are for x86 processors")

IN_ONEDNN = "mkldnn::_linear_pointwise"


@pytest.fixture(autouse=True)
def every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 1)


def operators(call: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        call()
    return {event.key for event in profile.key_averages()}


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7), (11, 7), (2, 3, 4, 7), (7,)])
@pytest.mark.parametrize("width", [4, 7, 9])
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], width: int, bias: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(width, 7), *([torch.randn(width)] if bias else [])]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = linear(*inputs), F.linear(*exact)
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-6)
    for found, reference in zip(gradients(y, inputs), gradients(expected, exact), strict=True):
        torch.testing.assert_close(found.double(), reference, atol=1e-5, rtol=1e-5)


def test_inputs_and_gradients_may_have_any_strides() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5, 4).transpose(0, 2).requires_grad_(), torch.randn(6, 3).t().requires_grad_()
    y = linear(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight))
    found = torch.autograd.grad(y.mean(), [x, weight], retain_graph=True)  # of mean(): one value, expanded
    torch.testing.assert_close(found, torch.autograd.grad(F.linear(x, weight).mean(), [x, weight]))


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_is_frozen_costs_nothing(frozen: str) -> None:
    x, layer = torch.randn(5, 4, requires_grad=frozen != "input"), Linear(4, 3)
    layer.weight.requires_grad_(frozen != "weight")
    layer.bias.requires_grad_(frozen != "bias")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    for name, tensor in {"input": x, "weight": layer.weight, "bias": layer.bias}.items():
        assert (tensor.grad is None) == (name == frozen)
    # each of the two products' gradients needs the other one's factor
    assert len(kept) == (2 if frozen == "bias" else 1)
    assert counter.get_total_flops() == len(kept) * 2 * 5 * 4 * 3


def test_only_large_products_leave_pytorchs_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(64, 32), torch.randn(10, 64)
    monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 10 * 64 * 32)
    assert IN_ONEDNN in operators(lambda: layer(x))
    assert IN_ONEDNN not in operators(lambda: layer(x[:9]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype) -> None:
    layer, x = Linear(4, 3).to(dtype), torch.randn(5, 4, dtype=dtype)
    assert IN_ONEDNN not in operators(lambda: layer(x))


def test_autocast_decides_the_dtype() -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert linear_gelu(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize("learns", [True, False])
def test_gelu_is_of_the_layers_output(learns: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(6, 5), torch.randn(2, 3, 6)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
    with torch.set_grad_enabled(learns):
        found = linear_gelu(layer, x)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == learns
    if learns:
        inputs = list(layer.parameters())
        torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


def test_gelu_where_everything_is_frozen_is_one_call() -> None:
    layer, x = Linear(6, 5).requires_grad_(False), torch.randn(3, 6)
    assert not {name for name in operators(lambda: linear_gelu(layer, x)) if "gelu" in name}


@pytest.mark.skipif(torch.bfloat16 not in module.DTYPES, reason="this processor has no products in bf16")
def test_bf16_gelu_is_rounded_once() -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 50).bfloat16(), torch.randn(20, 64).bfloat16()
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    with torch.no_grad():
        error = (linear_gelu(layer, x).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()


def test_flops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(6, 5), torch.randn(2, 3, 6, requires_grad=True)
    flops = []
    for dtypes in (module.DTYPES, ()):
        monkeypatch.setattr(module, "DTYPES", dtypes)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 3 * 2 * 6 * 6 * 5


def test_a_pytorch_without_the_operators_uses_the_public_functions() -> None:
    assert module._onednn_dtypes(SimpleNamespace()) == ()
    assert torch.bfloat16 not in module._onednn_dtypes(SimpleNamespace(_linear_pointwise=None))


def test_public_functions_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gate, up, down = Linear(64, 48), Linear(64, 48), Linear(48, 64)
    x = torch.randn(20, 64)
    results = []
    monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 1)
    for dtypes in (module.DTYPES, ()):
        monkeypatch.setattr(module, "DTYPES", dtypes)
        leaf = x.clone().requires_grad_()
        out = down(module.geglu(gate, up, leaf))
        gradients = torch.autograd.grad(out.square().sum(), [leaf, gate.weight, up.weight, down.weight, down.bias])
        with torch.no_grad():
            results.append([out.detach(), down(module.geglu(gate, up, x)), linear_gelu(gate, x), *gradients])
    for onednn, public in zip(*results, strict=True):
        torch.testing.assert_close(onednn, public)
