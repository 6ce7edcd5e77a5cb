"""A checkpoint's adapters and the base that they stand beside, merged into a plain model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora, with_adapters
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind, QuantizedLinear, quantized_layers, quantizing
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.safetensors import Keep, check_keys, keep_all, shapes_of


def merge(
    config: ModelConfig,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    base: Kind | None = None,
    frozen: Callable[[Keep], dict[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    keep: Keep = keep_all,
    errors: list[float] | None = None,
) -> dict[str, Tensor]:
    """The tensors of the plain model that those of a model with adapters amount to; one layer is merged at a time.

    base: what its frozen layers are quantised by, which are made whole.  frozen: has a plain model's tensors kept, for
    those that are missing; they are quantised, and made whole again.  dtype, keep: see `Weights.tensors`.
    errors: gets the error of every quantised layer, see `QuantizedLinear`.  ValueError that lists every missing,
    unexpected and misshaped key.
    """
    model = with_adapters(config, lora, base)
    expected, found = shapes_of(model.state_dict()), shapes_of(tensors)
    missing = [name for name in expected if name not in found and ".lora_" not in name] if frozen else []
    check_keys(found | {name: expected[name] for name in missing}, expected)
    quantized, errors = quantized_layers(model), [] if errors is None else errors
    add = Merging(config, lora, tensors)

    def whole_again(layer: QuantizedLinear, parts: Mapping[str, Tensor]) -> Tensor:
        errors.append(float(parts["error"]))
        return layer.dequantize(parts, layer.weight.shape)

    def take(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        # mapped ones would change with a file that another is written over, and are added to in place
        return keep(name, add(name, tensor.to(dtype or tensor.dtype, copy=True)))

    def take_missing(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        place = add.places[name]
        if place in tensors:
            return {}
        layer = quantized.get(place)
        return take(name, tensor if layer is None else whole_again(layer, layer.quantize(tensor)))

    merged: dict[str, Tensor] = {}
    for name, place in add.places.items():
        layer, above = quantized.get(place), place.removesuffix("weight")
        if place in tensors:
            merged |= take(name, tensors[place])
        elif layer is not None and f"{above}error" in tensors:
            parts = {part: tensors[above + part] for part in (*layer.parts, "error")}
            merged |= take(name, whole_again(layer, parts))
    return merged if frozen is None else merged | frozen(take_missing)


def fill_base(model: Pi05, read: Callable[[Keep], Mapping[str, Tensor]], own: Collection[str]) -> list[str]:
    """Have a model with adapters take over its base's tensors, but for its `own`; the names of what it took, there.

    Each becomes of the type that it has in the model, whatever it was rounded to before.
    read: has a plain model's tensors kept.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    quantized, types = quantizing(model), {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def keep(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        above, _, leaf = name.rpartition(".")
        place = f"{above}.base_layer.{leaf}" if above in adapted else name
        if place in own:
            return {}
        return {
            part: value.to(types[part]) if part == place else value for part, value in quantized(place, tensor).items()
        }

    tensors = read(keep)
    model.load_state_dict(tensors, strict=False, assign=True)
    return list(tensors)


def base_parameters(model: Pi05) -> dict[str, nn.Parameter]:
    """The parameters that a model has in common with a plain one, by the names there."""
    named = model.named_parameters()
    own = ("auxiliary.", ".lora_")
    return {name.replace(".base_layer", ""): p for name, p in named if not any(part in name for part in own)}


@torch.no_grad()
def fill_base_slices(model: Pi05, weights: Weights, dtype: torch.dtype, own: Collection[str]) -> list[str]:
    """As `fill_base`, of a sharded model: each rank reads its slices, into parameters of a type of their own.

    They are rounded to `dtype` on the way, as the base was when adapters were first put beside it.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    base: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model).items():
        base[name] = torch.empty_like(parameter) if names[parameter] in own else parameter
    weights.fill(base)
    for tensor in base.values():
        tensor.copy_(tensor.to(dtype))
    return [name for name, _ in model.named_parameters() if name not in own]


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
