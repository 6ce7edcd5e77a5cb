"""What a model is made of, and how it is made: without memory, with values, or as a rank's part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FSDPModule

from pi05_lightning.data.processor import Processor
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import HeadFactory
from pi05_lightning.models.parallelize import (
    Lora,
    Sharding,
    add_adapters,
    begin_sharded,
    checkpoint_blocks,
    compile_blocks,
    quantize_base,
    reset_adapters,
    shard,
    with_adapters,
)
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind
from pi05_lightning.recipe import Stage
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.beginning import begin, begin_slices


@dataclass(frozen=True)
class Blueprint:
    """A model's dimensions, its auxiliary heads, and what is put on it from outside; `Pi05Module` says what each is.

    Raises ValueError for a quantised base without adapters beside it.
    """

    config: ModelConfig
    heads: dict[str, HeadFactory] | None = None
    lora: Lora | None = None
    base: Kind | None = None
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.base is not None and self.lora is None:
            raise ValueError(
                f"model.base {self.base} is how layers are kept that adapters are trained beside, and there are none:"
                " add model.lora (--model.lora.rank 16), or leave model.base out"
            )

    def bare(self) -> Pi05:
        """The model without memory, and nothing put on it."""
        return Pi05.without_memory(self.config, self.heads)

    def blank(self, stage: Stage | None = None) -> Pi05:
        """A model of the same parts without memory, frozen as in a stage: what a step costs can be counted on it."""
        model = self.bare() if self.lora is None else with_adapters(self.config, self.lora, self.base, self.heads)
        if self.activation_checkpointing:
            checkpoint_blocks(model)
        for name, parameter in model.named_parameters():
            # what a quantised layer holds never learns
            parameter.requires_grad = parameter.is_floating_point() and not (stage and stage.freezes(name))
        return model

    def make(self, model: Pi05, weights: Weights | None, processor: Processor | None, hollow: bool = False) -> None:
        """Give a `bare` model memory and values, those of weights or random ones; one with memory keeps its values.

        hollow: it gets memory alone.
        """
        blank = model.device.type == "meta"
        if blank:
            model.to(torch.get_default_dtype())  # bf16 under pure bf16, so that no fp32 copy is ever made
            if self.lora is not None and self.base is not None:
                quantize_base(model, self.base, self.lora)
            if not hollow:
                begin(model, weights, processor)
        if self.lora is not None:
            add_adapters(model, self.lora)
        if blank and hollow:
            model.to_empty(device=torch.get_default_device())
            model.fill_buffers()
        self._accelerate(model)

    def make_shards(
        self,
        model: Pi05,
        weights: Weights | None,
        processor: Processor | None,
        hollow: bool,
        sharding: Sharding,
        broadcast: Callable[[Any], Any],
    ) -> None:
        """As `make`, so that no rank ever has more than its part, and one layer of the others'.

        broadcast: gives every rank the first one's value.  ValueError for a model that has memory.
        """
        if model.device.type != "meta":
            raise ValueError("a model that has weights already cannot be divided between ranks: make a new Pi05Module")
        model.to(torch.get_default_dtype())
        if self.lora is not None:
            add_adapters(model, self.lora)
        shard(model, sharding)
        model.to_empty(device=torch.get_default_device())
        if hollow:
            model.fill_buffers()
        else:
            share_random_state(broadcast)
            begin_slices(model, weights, processor)
            if self.lora is not None:
                reset_adapters(model)
        begin_sharded(model)
        self._accelerate(model)

    def _accelerate(self, model: Pi05) -> None:
        if self.compile:
            compile_blocks(model)
        if self.activation_checkpointing:
            checkpoint_blocks(model)


def share_random_state(broadcast: Callable[[Any], Any]) -> None:
    """Have every rank draw the same random numbers: of what they make, each keeps a slice."""
    generators: list[Any] = [torch.random, *([torch.cuda] if torch.get_default_device().type == "cuda" else [])]
    for generator in generators:
        generator.set_rng_state(broadcast(generator.get_rng_state()))


def division_under(strategy: Strategy, sharding: Sharding | None, base: Kind | None) -> Sharding | None:
    """How a strategy has the weights divided, if it does. sharding: what fsdp2 says.

    ValueError for one that divides them otherwise, and for a base that no strategy divides.
    """
    if not isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        return None
    if base is not None:
        raise ValueError(
            f"model.base {base} is not sharded (trainer.strategy {type(strategy).__name__}), as FSDP2 divides"
            " floating-point weights alone: leave model.base out, or give trainer.strategy ddp, with which each rank"
            " has the quantised base whole"
        )
    if sharding is None:
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} shards the weights in a way that this model, its stages'"
            " freezing and its averaged weights do not support: use fsdp2, which divides them between the ranks too"
        )
    return sharding


def check_division(model: Pi05, sharding: Sharding | None) -> None:
    """ValueError for a model that was made divided otherwise than it is to be now."""
    if isinstance(model, FSDPModule) != (sharding is not None):
        raise ValueError(
            "the model was made by a trainer with another strategy, and cannot be divided between ranks, or put"
            " together, any more: make a new Pi05Module, with model.init_from"
        )
