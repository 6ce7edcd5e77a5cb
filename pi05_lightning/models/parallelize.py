"""What is done to a finished model from outside, in this order: adapters, compilation, activation checkpointing.

Adapters are LoRA's (arXiv 2106.09685), through PEFT: small trained matrices beside frozen linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from pi05_lightning.files.ranges import check
from pi05_lightning.models.gemma import Block, ExpertBlock
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.siglip import SiglipBlock


@dataclass(frozen=True)
class Lora:
    """Which linear layers of backbone and action expert get adapters, and what is trained whole beside them."""

    rank: int = 16
    alpha: int = 16
    """What an adapter computes is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str = ""
    """Regular expression over the names of linear layers; empty: all of them."""
    train: tuple[str, ...] = ("time_mlp", "action_in_proj", "action_out_proj", "projector", "auxiliary")
    """Regular expressions: parameters that are trained whole. All others but the adapters are frozen."""

    def __post_init__(self) -> None:
        check("lora.rank", self.rank, 1)
        check("lora.alpha", self.alpha, 0, above=True)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}: it must be in [0, 1)")
        for pattern in (self.targets, *self.train):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} in lora is no regular expression: {error}") from error

    def check_patterns(self, names: Collection[str]) -> None:
        """Raises ValueError for a pattern of `train`, other than those by default, that none of the names matches."""
        for pattern in self.train:
            if pattern not in Lora.train and not any(re.search(pattern, name) for name in names):
                raise ValueError(f"lora.train {pattern!r} matches no parameter of the model")

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


@torch.no_grad()
def merge_adapters(model: Pi05) -> Pi05:
    """Add every adapter into the layer it stands beside and remove it, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model


def blocks_of(model: Pi05) -> Iterator[nn.Module]:
    """Every SigLIP, Gemma and expert block."""
    return (block for block in model.modules() if isinstance(block, SiglipBlock | Block | ExpertBlock))


def compile_blocks(model: Pi05) -> None:
    """Compile every block for training steps; before `checkpoint_blocks`, which runs what it finds once more.

    Blocks of a kind have the same code, so that each kind is compiled once, however deep the model. Between them there
    is little to fuse. Without gradients they run as they are: validation and rollouts have more shapes than the
    compiler keeps graphs for, and once it gives up on a function, training would go on without it.
    """
    for block in blocks_of(model):
        # on the instance, so that names of parameters stay what they are
        block.forward = _compiled_where_it_learns(block.forward)


def _compiled_where_it_learns(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    @wraps(forward)
    def call(*args: Any, **options: Any) -> Any:
        # a function that the compiler first meets within a mode, such as the counter of FLOPs, it passes over for good
        learns = torch.is_grad_enabled() and not is_in_torch_dispatch_mode()
        return (compiled if learns else forward)(*args, **options)

    return call


@contextmanager
def compiled_blocks(model: Pi05) -> Iterator[None]:
    """Within it every block is compiled, without gradients too: for what is recorded once and replayed."""
    own = {block: block.__dict__.get("forward") for block in blocks_of(model)}
    for block in own:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def checkpoint_blocks(model: Pi05) -> None:
    """Keep of every block its input alone; the backward pass runs the block once more."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
