"""A model's first values: those of weights on disk, or random ones."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from pi05_lightning.data.processor import Processor
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import quantizing
from pi05_lightning.ranks import is_first_rank
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.adapters import base_parameters
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.safetensors import fill
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

log = logging.getLogger(__name__)


def begin(model: Pi05, weights: Weights | None, processor: Processor | None) -> None:
    """Give a model on the meta device memory and values, quantised where it keeps them so.

    Auxiliary heads are random, whatever a checkpoint had.  ValueError that lists every key that does not fit.
    """
    device = torch.get_default_device()
    if weights is None:
        model.to_empty(device=device)
        _reset(model, processor)
        return
    tensors = weights.tensors(torch.get_default_dtype(), quantizing(model))
    auxiliary = model.auxiliary.to_empty(device=device)
    _reset_auxiliary(model, weights)
    fill(model, tensors | auxiliary.state_dict(prefix="auxiliary."), where=weights.path)


def begin_slices(model: Pi05, weights: Weights | None, processor: Processor | None) -> None:
    """Give a sharded model that has memory its values, but for adapters; of weights each rank reads its slices alone.

    ValueError as of `begin`.
    """
    if weights is None:
        _reset(model, processor)
    else:
        _reset_auxiliary(model, weights)
        weights.fill(base_parameters(model))


def _reset_auxiliary(model: Pi05, weights: Weights) -> None:
    model.reset_auxiliary()
    theirs = weights.own_heads if isinstance(weights, TrainingCheckpoint) else set[str]()
    if (left_out := sorted(theirs.intersection(model.auxiliary))) and is_first_rank():
        log.warning("%s: its heads %s are left out, and are random again", weights.path, ", ".join(left_out))


def _reset(model: Pi05, processor: Processor | None) -> None:
    model.reset_parameters(processor.tokenizer.ordinal_ids() if processor else None)


def moved_cameras(model: Pi05, weights: Weights, processor: Processor | None) -> str | None:
    """What to say where weights that have keypoints of their own for each camera get the cameras in another order."""
    if not isinstance(model.backbone.vision, KeypointStem) or processor is None:
        return None
    known = list(weights.processor().cameras)
    moved = [name for place, name in enumerate(processor.cameras) if name in known and known.index(name) != place]
    if not moved:
        return None
    return (
        f"{weights.path}: it was trained with the cameras {', '.join(known)}, in this order, and the data has"
        f" {', '.join(processor.cameras)}: what it knows of {', '.join(moved)} is lost. Give data.cameras its order, as"
        f" [{', '.join(known)}]"
    )


def carried_on(weights: Weights, processor: Processor | None) -> Trained:
    """What weights were trained on that still holds: not FAST tokens that stand for other actions in a processor."""
    found, fast = weights.trained, processor and processor.fast
    if "fast" in found.terms and fast is not None:
        theirs = weights.processor().fast
        if theirs is None or theirs.to_dict() != fast.to_dict():
            return replace(found, terms={name: n for name, n in found.terms.items() if name != "fast"})
    return found
