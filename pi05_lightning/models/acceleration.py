"""Activation checkpointing and compilation, applied to a finished model from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
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


def compile_calls(model: Pi05, flex_attention: bool = False) -> None:
    """Compile the two calls that a training step consists of, the backbone's and the flow head's.

    flex_attention: they attend with FlexAttention, which PyTorch can train on GPUs alone.

    Without gradients they run as they are: validation and rollouts have more shapes than the compiler keeps graphs
    for, and once it gives up on a function, training would go on without it.
    """
    for part in (model.backbone, model.flow_head):
        part.flex_attention = flex_attention
        part.forward = _compiled_where_it_learns(part.forward)  # type: ignore[method-assign]


def _compiled_where_it_learns(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    @wraps(forward)
    def call(*args: Any, **options: Any) -> Any:
        # a function that the compiler first meets within a mode, such as the counter of FLOPs, it passes over for good
        learns = torch.is_grad_enabled() and not is_in_torch_dispatch_mode()
        return (compiled if learns else forward)(*args, **options)

    return call
