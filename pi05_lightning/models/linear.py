"""Linear layers whose large products run in oneDNN on x86 processors.

In fp32, where PyTorch takes MKL, its kernels are faster (benchmarks/NOTES.md); in bf16 they are PyTorch's own choice.
In both, an activation costs next to nothing while its input is in cache, and that input is not rounded to bf16 first.
Else only the order of the sums differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

MIN_MULTIPLICATIONS = 1 << 25  # of a product below it, the call costs what the kernel saves


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


DTYPES = _onednn_dtypes()


class Linear(nn.Linear):
    """`nn.Linear`, by way of `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [... in], weight [out in], bias [out] -> x weightᵀ + bias [... out], by the library that is fastest for it."""
    if not _runs_in_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu, in its tanh approximation, of layer(x); where nobody can ask for a gradient, without a tensor between."""
    if isinstance(layer, Linear) and _runs_in_onednn(x, layer.weight):
        learns = any(t is not None and t.requires_grad for t in (x, layer.weight, layer.bias))
        if not (torch.is_grad_enabled() and learns):
            return _product(x, layer.weight, layer.bias, "gelu")
    y = layer(x)
    if y.requires_grad or torch.compiler.is_compiling():
        return F.gelu(y, approximate="tanh")
    return torch.ops.aten.gelu_(y, approximate="tanh")


def _runs_in_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """PyTorch's one operator that asks oneDNN for a product in fp32; its own compiler calls it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "tanh")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grads = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad, weight.t()) if of_x else None
        grad_weight = None
        if of_weight:
            inputs = x.reshape(-1, x.shape[-1])
            is_wide = inputs.shape[1] > grads.shape[1]  # else MKL is the faster one
            grad_weight = _product(grads.t(), inputs.t()) if is_wide else grads.t() @ inputs
        return grad_x, grad_weight, grads.sum(0) if of_bias else None


if DTYPES:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return 2 * x.numel() * weight[0]
