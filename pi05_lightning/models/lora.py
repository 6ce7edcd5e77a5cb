"""LoRA (arXiv 2106.09685) through PEFT: small trained matrices beside frozen linear layers, merged for inference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi05_lightning.models.checkpoint import check_keys
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05


@dataclass(frozen=True)
class Lora:
    """Which linear layers of backbone and action expert get adapters, and what is trained whole beside them."""

    rank: int = 16
    alpha: int = 16
    """What an adapter computes is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str = ""
    """Regular expression over the names of linear layers; empty: all of them."""
    train: tuple[str, ...] = ("time_mlp", "action_in_proj", "action_out_proj", "projector")
    """Regular expressions: parameters that are trained whole. All others but the adapters are frozen."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}: it must be in [0, 1)")

    @property
    def frozen(self) -> str:
        """A regular expression of the parameters that stay as they are; what `Stage.freeze` wants."""
        return f"^(?!.*({'|'.join((r'\.lora_', *self.train))}))"


def add_adapters(model: Pi05, lora: Lora) -> None:
    """Put adapters beside the model's linear layers, in place; they start as zero, so nothing changes yet.

    ValueError when `targets` matches no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and re.search(lora.targets, name)
        and not any(re.search(pattern, name) for pattern in lora.train)
    ]
    if not layers:
        raise ValueError(f"lora.targets {lora.targets!r} matches no linear layer that lora.train leaves")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=layers,
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=model.device.type == "meta")


def build_merged(config: ModelConfig, lora: Lora, tensors: Mapping[str, Tensor]) -> Pi05:
    """The plain model that a checkpoint with adapters amounts to; takes over `tensors` and adds the adapters into them.

    ValueError that lists every missing, unexpected and misshaped key.
    """
    with torch.device("meta"):
        model = Pi05(config)
    add_adapters(model, lora)
    check_keys(sizes(tensors), sizes(model.state_dict()))
    model.load_state_dict(tensors, assign=True)
    return merge_adapters(model)


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def merge_adapters(model: Pi05) -> Pi05:
    """Add every adapter into the layer it stands beside and remove it, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model
