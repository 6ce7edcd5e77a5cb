"""The kernels that the model spends its time in: linear layers, GeGLU and attention, by the fastest way there is here.

On x86 processors large products run in oneDNN. In fp32, where PyTorch takes MKL, its kernels are faster
(benchmarks/NOTES.md); in bf16 they are PyTorch's own choice. In both, an activation costs next to nothing while its
input is in cache, and that input is not rounded to bf16 first. Else only the order of the sums differs. All that is no
public interface of PyTorch is in this file, and used only where `DTYPES` says that it is there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

MIN_MULTIPLICATIONS = 1 << 25  # of a product below it, the call costs what the kernel saves


def _onednn_dtypes(operators: Any = torch.ops.mkldnn) -> tuple[torch.dtype, ...]:
    """What this processor and this PyTorch can multiply in oneDNN; nothing where PyTorch has no operator for it."""
    has_processor = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not has_processor or not hasattr(operators, "_linear_pointwise"):
        return ()
    has_bf16 = hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


DTYPES = _onednn_dtypes()


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing on the meta device: torch imports its compiler for that, a second or more."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


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


def geglu(gate_proj: nn.Module, up_proj: nn.Module, x: Tensor) -> Tensor:
    """gelu_tanh(gate_proj(x)) · up_proj(x)."""
    up = up_proj(x)
    if not up.requires_grad:
        return linear_gelu(gate_proj, x).mul_(up)
    gate = gate_proj(x)
    if torch.compiler.is_compiling():  # an in-place product in an autograd.Function would lose its gradient
        return F.gelu(gate, approximate="tanh") * up
    return GeGLU.apply(gate, up)


class GeGLU(torch.autograd.Function):
    """gelu_tanh(gate) · up, which keeps its two inputs for the backward pass and not gelu's output beside them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return grad_gate, F.gelu(gate, approximate="tanh").mul_(grad)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v -> [B H S d].

    q [B H S d]; k, v [B H_kv S_k d], each read by H / H_kv query heads.
    mask: bool[B 1 S S_k], or bool[B 1 1 S_k] where it is the same for every query; without one all see all.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attend_in_two_products(q, k, v, mask)
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == heads:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if mask is None or mask.shape[2] == 1:  # query heads that share a key are more queries of one head
        folded = rearrange(q, "b (h g) s d -> b h (g s) d", h=kv_heads)
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
        return rearrange(out, "b h (g s) d -> b (h g) s d", s=q.shape[2])
    if kv_heads == 1:  # a view: nothing is copied
        k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    else:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_in_two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # PyTorch's fused kernel for the CPU does not use the processor's bf16 instructions in its backward pass, plain
    # products do; query heads that share a key are rows of one product
    kv_heads, queries = k.shape[1], q.shape[2]
    q = rearrange(q * q.shape[-1] ** -0.5, "b (h g) s d -> b h (g s) d", h=kv_heads)
    scores = q @ k.transpose(-1, -2)
    if mask is not None:  # the weight of what is hidden is 0, and so is its gradient: nothing to go back through
        of_heads = rearrange(scores.detach(), "b h (g s) t -> b (h g) s t", s=queries)
        of_heads.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return rearrange(scores.softmax(-1) @ v, "b h (g s) d -> b (h g) s d", h=kv_heads, s=queries)
