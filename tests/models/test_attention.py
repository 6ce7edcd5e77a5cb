"""Attention and GeGLU against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_lightning.models.gemma import MLP
from pi05_lightning.models.kernels import GeGLU, attend


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v in float64, the keys copied to every head."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


MASKS = {
    "all see all": lambda: None,
    "the same for every query": lambda: torch.tensor([True, False, True, True, False, True, True]).expand(2, 1, 1, 7),
    "of each query": lambda: torch.ones(5, 7, dtype=torch.bool).tril(2).expand(2, 1, 5, 7),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_attention_and_its_gradients_are_the_formulas(mask, kv_heads, dtype, tolerance) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, length, 4, dtype=dtype) for heads, length in ((6, 5), (kv_heads, 7), (kv_heads, 7))]
    results = []
    for attention in (attend, formula):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = attention(*leaves, mask())
        out.double().square().sum().backward()
        results.append([out.double(), *(leaf.grad.double() for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def test_geglu_has_the_gradient_of_its_formula() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GeGLU.apply, (gate, up))
    assert torch.equal(GeGLU.apply(gate, up), F.gelu(gate, approximate="tanh") * up)


def test_mlp_without_gradients_gives_the_same() -> None:
    mlp, x = MLP(8, 16), torch.randn(2, 3, 8)
    expected = mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x), expected)
