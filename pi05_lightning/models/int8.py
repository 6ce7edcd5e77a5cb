"""Linear layers that compute in 8-bit integers on a CPU, for inference.

The product is PyTorch's own (engine `x86`, which is FBGEMM): the weight is packed once, with a scale for each output;
the input is rounded as it comes, to 7 bits, as without AVX512-VNNI the sums of two products would not fit their 16 bits
otherwise. PyTorch's dynamic layer gives the whole input one scale. Here every row has its own scale and its own zero:
a token of large values costs the others no precision, and what a row comes to does not depend on who else is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pi05_lightning.models.kernels import DTYPES, Linear

UNEMBEDDING = "backbone.unembedding"
"""Among the layers that can compute in 8 bits: the embedding where it makes logits. To look tokens up it is whole."""
PACKED = 1 << 25
"""Values of a weight that are packed at a time: no layer of π0.5 has more, but its embedding has."""
ROUNDING = 2
"""Changes with how an input is rounded: which layers can compute in 8 bits was measured with it."""
STEPS, ZERO = 127, 64
"""Of a row, from its smallest value to its largest; and which integer the product takes for 0."""
REST = torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float32
"""What computes beside 8-bit products: bf16 where the processor multiplies in it."""


def check_int8() -> None:
    """ValueError where this machine has no engine for 8-bit products."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        raise ValueError(
            "dtype int8: PyTorch has no 8-bit products for this machine (its engine `x86` needs a processor with AVX2),"
            " so leave dtype out, or set it to bfloat16"
        )


class Int8Product(nn.Module):
    """A linear layer of 8-bit products; x [... in] -> [... out] in the type of x.

    Its weight [out in] is packed, some rows at a time: that takes little more memory than what is kept. `weight` itself
    is without values (on the meta device).
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self._packed = [_prepacked(rows) for rows in weight.detach().split(max(1, PACKED // self.in_features))]
        self._sums = self._product(torch.ones(1, self.in_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(torch.float32, copy=True)
        least = rows.amin(1, keepdim=True).clamp_max_(0)
        step = (rows.amax(1, keepdim=True).clamp_min_(0) - least).div_(STEPS).clamp_min_(1e-30)
        shift = least.div_(step).round_().add_(ZERO).neg_()  # whole, so that 0 stays exact
        y = self._product(rows.div_(step).add_(shift))
        y.addcmul_(shift, self._sums, value=-1).mul_(step)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        """Of rows f32[N in] within [-ZERO, STEPS - ZERO], which are rounded to whole numbers: f32[N out]."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        parts = [multiply(rows, 1.0, ZERO, packed) for packed in self._packed]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _prepacked(weight: Tensor) -> Any:
    """A weight [out in] as PyTorch's product takes it, every row rounded to 127ths of its largest value."""
    values = weight.float()
    scale = _largest(values)[:, 0].double() / 127
    rounded = torch.quantize_per_channel(values, scale, torch.zeros_like(scale, dtype=torch.long), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None)


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row, [rows 1], and never 0; many times as fast as PyTorch's norm of inf."""
    return torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_()).clamp_min_(1e-30)


class Measured(nn.Module):
    """A linear layer that computes as before, and measures how far its 8-bit product would be from that."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.layer, self.product = layer, Int8Product(layer.weight, layer.bias)
        self.weight = self.product.weight
        self.ran = False
        self._difference, self._size = 0.0, 0.0  # sums of squares

    @property
    def error(self) -> float:
        """Of all that it computed, the norm of the difference over that of the output; 0 before it ran."""
        return (self._difference / max(self._size, 1e-30)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.ran = True
        self._difference += (self.product(x) - y).float().square().sum().item()
        self._size += y.float().square().sum().item()
        return y


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers that can compute in 8 bits, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def unembedding(embedding: nn.Embedding) -> Linear:
    """The layer that makes logits by an embedding, over the same weight."""
    with torch.device("meta"):
        layer = Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
    layer.weight = embedding.weight
    return layer


def computes_in_int8(model: nn.Module) -> bool:
    """Whether any layer does."""
    return any(isinstance(layer, Int8Product) for layer in model.modules())
