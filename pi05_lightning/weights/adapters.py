"""A checkpoint's adapters and the base that they stand beside, merged into a plain model's tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora, add_adapters, quantize_base
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind, quantized_layers
from pi05_lightning.weights.safetensors import Keep, check_keys, shapes_of, whole


def with_adapters(config: ModelConfig, lora: Lora, base: Kind | None = None) -> Pi05:
    """A model without memory, with adapters, whose base is quantised or not."""
    with torch.device("meta"):
        model = Pi05(config)
    if base is not None:
        quantize_base(model, base, lora)
    add_adapters(model, lora)
    return model


def merge(
    config: ModelConfig,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    base: Kind | None = None,
    dtype: torch.dtype | None = None,
    keep: Keep = whole,
    errors: list[float] | None = None,
) -> dict[str, Tensor]:
    """The tensors of the plain model that those of a model with adapters amount to; one layer is merged at a time.

    base: what its frozen layers are quantised by, which are made whole.  dtype, keep: see `Weights.tensors`.
    errors: gets the error of every quantised layer, see `QuantizedLinear`.  ValueError that lists every missing,
    unexpected and misshaped key.
    """
    model = with_adapters(config, lora, base)
    check_keys(shapes_of(tensors), shapes_of(model.state_dict()))
    quantized = quantized_layers(model)
    add = Merging(config, lora, tensors)
    merged: dict[str, Tensor] = {}
    for name, place in add.places.items():
        layer = quantized.get(place)
        if layer is None:
            tensor = tensors[place]
        else:
            above = place.removesuffix("weight")
            tensor = layer.dequantize({part: tensors[above + part] for part in layer.parts}, layer.weight.shape)
            if errors is not None:
                errors.append(float(tensors[f"{above}error"]))
        # mapped from a file that may be replaced, they would be read from it page by page while training
        copy = dtype is not None or place != name  # what the adapter is added to
        merged |= keep(name, add(name, tensor.to(dtype or tensor.dtype, copy=copy)))
    return merged


class Merging:
    """Adds a checkpoint's adapters to weights in place, each as it is handed over.

    places: the name of every tensor of the plain model -> its name beside adapters.
    """

    def __init__(self, config: ModelConfig, lora: Lora, tensors: Mapping[str, Tensor]) -> None:
        from peft.tuners.lora import LoraLayer

        model, self._tensors = with_adapters(config, lora), tensors
        places = (name for name in model.state_dict() if ".lora_" not in name)
        self.places = {name.replace(".base_layer", ""): name for name in places}
        self._layers = {
            f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor that a plain model has under a name, of what the base has under it."""
        layer = self._layers.pop(name, None)
        if layer is None:
            return tensor
        layer.get_base_layer().weight = nn.Parameter(tensor, requires_grad=False)
        for part in ("lora_A", "lora_B"):
            for adapter, matrix in getattr(layer, part).items():
                own = self._tensors[f"{name.removesuffix('weight')}{part}.{adapter}.weight"]
                matrix.weight = nn.Parameter(own.to(tensor.dtype), requires_grad=False)
        layer.merge()
        return tensor
