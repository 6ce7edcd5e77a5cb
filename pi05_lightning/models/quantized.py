"""Frozen linear layers whose weight has 4 or 8 bits a value, for adapters to be trained beside (QLoRA, 2305.14314).

torchao quantises. What it makes of a weight is held as plain tensors, which are saved, moved, sent to other ranks and
compiled like any others; for a product the weight is made whole, and made once more in the backward pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pi05_lightning.models.kernels import linear

Kind = Literal["nf4", "int8"]
NF4_BLOCK, NF4_BLOCKS = 64, 256
"""Values that share a scale, and scales that share theirs; fewer of these where a weight does not divide by them."""
CHUNK = 1 << 20  # values that are rounded at a time


class QuantizedLinear(nn.Linear, ABC):
    """A linear layer of the shape, type and bias of another one, whose weight is quantised and never trained.

    It holds the parts of its weight as parameters, and as `error` how far it is from the weight that was given: the
    norm of the difference over that of the weight, f32[].
    """

    parts: ClassVar[tuple[str, ...]]
    """The last has the type of the weight, which `weight` takes from it."""
    error: nn.Parameter

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)  # `weight` is no parameter here
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.hold(self.quantize(layer.weight.detach()))

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a weight can be quantised."""
        return True

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        """What is held of a weight [out in], by name; takes the memory of a few such weights for a moment."""
        parts = cls._quantize(weight)
        difference = cls.dequantize(parts, weight.shape).sub_(weight)
        error = difference.norm(dtype=torch.float32) / weight.norm(dtype=torch.float32).clamp_min(1e-30)
        return parts | {"error": error}

    @staticmethod
    @abstractmethod
    def _quantize(weight: Tensor) -> dict[str, Tensor]: ...

    @staticmethod
    @abstractmethod
    def dequantize(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The weight that parts stand for, in the type of the one that they were made of, in memory of its own."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Of the weight's shape, type and device, what PEFT and others ask of a layer; its values are NaN."""
        return getattr(self, self.parts[-1]).new_full((), math.nan).expand(self.out_features, self.in_features)

    def hold(self, parts: Mapping[str, Tensor]) -> None:
        """Take over what `quantize` made."""
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part, requires_grad=False))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out in] as the layer computes with it."""
        shape = torch.Size((self.out_features, self.in_features))
        return self.dequantize({name: getattr(self, name) for name in self.parts}, shape).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self)


class NF4Linear(QuantizedLinear):
    """4 bits a value, as one of 16 levels that suit a normal distribution, and 8 bits for the scale of 64 values."""

    parts = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")
    quantized_data: nn.Parameter
    quantized_scalers: nn.Parameter
    quantization_factor: nn.Parameter
    scaler_mean: nn.Parameter
    nf4: nn.Parameter

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.numel() % NF4_BLOCK == 0

    @staticmethod
    def _quantize(weight: Tensor) -> dict[str, Tensor]:
        from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4  # takes seconds to import

        blocks = weight.reshape(-1, NF4_BLOCK)
        shared = next(n for n in range(NF4_BLOCKS, 0, -1) if len(blocks) % n == 0)
        scalers, factor, mean = NF4Tensor.double_quantize_scalers(blocks.flatten(), NF4_BLOCK, shared)
        factor = factor.clamp_max(torch.finfo(factor.dtype).max)  # where all scales are equal, as of zeros, it is inf
        levels = to_nf4(blocks[:1], NF4_BLOCK, 1).nf4
        # as `NF4Tensor.convert_to_norm_float_weight`, which compares every value with every level in their type: a
        # tenth of the time
        borders = (levels[1:].float() + levels[:-1].float()) / 2
        nearest = torch.zeros_like(blocks, dtype=torch.uint8)
        rows = len(blocks) if blocks.is_meta else CHUNK // NF4_BLOCK
        for values, numbers in zip(blocks.split(rows), nearest.split(rows), strict=True):
            scaled = (values / values.abs().amax(1, keepdim=True).clamp_min(1e-30)).float()
            for border in borders:
                numbers += scaled > border
        pairs = nearest.flatten().unflatten(0, (-1, 2))
        return dict(zip(NF4Linear.parts, (pairs[:, 0] << 4 | pairs[:, 1], scalers, factor, mean, levels), strict=True))

    @staticmethod
    def dequantize(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        # as `NF4Tensor.get_original_weight`, by a table of both values of a byte: a tenth of the time and of the memory
        data, scalers, factor, mean, levels = (parts[name] for name in NF4Linear.parts)
        scales = (scalers.view(len(factor), -1) / factor[:, None]).flatten().to(levels.dtype) + mean
        table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        values = F.embedding(data.int(), table).view(len(scales), -1)
        return values.mul_(scales[:, None]).view(shape)


class Int8Linear(QuantizedLinear):
    """8 bits a value and a scale for each output."""

    parts = ("qdata", "scale")
    qdata: nn.Parameter
    scale: nn.Parameter

    @staticmethod
    def _quantize(weight: Tensor) -> dict[str, Tensor]:
        from torchao.quantization import Int8Tensor, PerRow  # takes seconds to import

        made = Int8Tensor.from_hp(weight, PerRow())
        return {"qdata": made.qdata, "scale": made.scale}  # its zero point is 0

    @staticmethod
    def dequantize(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        return parts["qdata"] * parts["scale"]


CLASSES: dict[Kind, type[QuantizedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


class _Product(torch.autograd.Function):
    """x [... in] -> x weightᵀ + bias, which keeps no whole weight for the backward pass, and no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return linear(grad, ctx.layer.dequantized(grad.dtype).t()), None


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by the name that their weight would have."""
    found = model.named_modules()
    return {f"{name}.weight": layer for name, layer in found if isinstance(layer, QuantizedLinear)}


def values_of(module: nn.Module) -> dict[nn.Parameter, int]:
    """How many values each parameter stands for: of a quantised layer's parts the first for its weight, others none."""
    values = {parameter: parameter.numel() for parameter in module.parameters()}
    for layer in quantized_layers(module).values():
        first, *others = (getattr(layer, name) for name in (*layer.parts, "error"))
        values |= {first: layer.in_features * layer.out_features, **dict.fromkeys(others, 0)}
    return values


def quantizing(model: nn.Module) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """What a model keeps of a tensor that is read for it, by name and tensor: of a quantised layer's weight, its parts.

    One of another shape stays as it is, for whoever compares names and shapes.
    """
    layers = quantized_layers(model)

    def keep(name: str, tensor: Tensor) -> dict[str, Tensor]:
        layer = layers.get(name)
        if layer is None or tensor.shape != (layer.out_features, layer.in_features):
            return {name: tensor}
        above = name.removesuffix("weight")
        return {above + part: value for part, value in layer.quantize(tensor).items()}

    return keep


def set_weight(layer: nn.Linear | nn.Conv2d, fill: Callable[[Tensor], Tensor]) -> None:
    """Give a layer's weight values, by what fills a tensor in place; of a quantised one, a whole one is made for it."""
    if isinstance(layer, QuantizedLinear):
        like = layer.weight
        layer.hold(layer.quantize(fill(torch.empty(like.shape, dtype=like.dtype, device=like.device))))
    else:
        fill(layer.weight)
