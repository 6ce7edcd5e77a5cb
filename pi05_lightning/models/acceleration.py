"""Activation checkpointing and compilation, applied to a finished model from outside."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from pi05_lightning.models.gemma import Block, ExpertBlock
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.siglip import SiglipBlock


def checkpoint_blocks(model: Pi05) -> None:
    """Keep of every SigLIP, Gemma and expert block its input alone; the backward pass runs the block once more."""
    for block in model.modules():
        if isinstance(block, SiglipBlock | Block | ExpertBlock):
            # on the instance, so that names of parameters stay what they are
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_calls(model: Pi05) -> None:
    """Compile the two calls that a training step and inference consist of: the backbone and the flow head."""
    model.backbone.compile()
    model.flow_head.compile()
