"""Which layers of a policy compute in 8 bits: all whose errors leave its actions and its subtasks as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from pi05_lightning.acting.frames import made_up_frames, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.acting.options import Acting, says_subtasks
from pi05_lightning.models.int8 import (
    REST,
    UNEMBEDDING,
    Int8Product,
    Measured,
    check_int8,
    linear_layers,
    unembedding,
)
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Frame
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.int8 import Choice, Fingerprint, Way, int8_model

log = logging.getLogger(__name__)

MAX_LAYER_ERROR = 0.1
"""Of a layer's output. Rounding alone gives 0.015; more is a matter of a few values that are far from all others."""
MAX_ACTION_ERROR = 0.02
"""Of the range of an action's dimension, see `Quantiles.computed_unit`."""
STEPS = 16  # in so many steps all layers would be taken back
FRAMES = 8  # recorded ones


def int8_weights(weights: Weights, acting: Acting) -> Pi05:
    """The model of a policy's weights that computes in 8 bits, as the choice beside them says.

    Where there is none for this way of acting, or one that was made of other weights, it is made from the answers to a
    few frames, and written.  acting: as which robot, with which actions, and whether it says subtasks.
    Raises ValueError where this machine has no 8-bit products.
    """
    check_int8()
    processor, file = weights.processor(), Choice.file(weights)
    way = Way(processor.acting_as(acting.robot), acting.actions, says_subtasks(acting, processor, weights.trained))
    choice = Choice.read(file).get(way)
    model = _as_chosen(weights, choice) if choice is not None else None
    if model is not None:
        return model
    log.info("measuring which layers can compute in 8 bits")
    how = Acting(**way._asdict(), max_state_distance=None)
    policy = Inference(weights.model(REST), processor, how, trained=weights.trained)
    choice = choose(policy, [*recorded_frames(policy, None, FRAMES), *made_up_frames(policy)])
    log.info(
        "%d of %d layers that run compute in 8 bits; actions differ by %.2g of their range at most",
        len(choice.errors.keys() - set(choice.kept)),
        len(choice.errors),
        choice.action_error,
    )
    try:
        choice.write(file)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start measures anew", file, error)
    return policy.model


def _as_chosen(weights: Weights, choice: Choice) -> Pi05 | None:
    """The model as a choice says; None where that was made of other weights."""
    found = Fingerprint()
    model = int8_model(weights, choice.kept, found)
    if found.hexdigest() != choice.fingerprint:
        return None
    if UNEMBEDDING not in choice.kept:
        model.backbone.unembedding = Int8Product(model.backbone.embed_tokens.weight)
    return model


def choose(policy: Inference, frames: Sequence[Frame]) -> Choice:
    """Have a policy compute in 8 bits where its answers to frames allow, in place.

    Those layers are left out that did not run or whose own error is above `MAX_LAYER_ERROR`, and then the worst ones,
    until it says the same subtasks and no action is further than `MAX_ACTION_ERROR` from what it was.
    ValueError without frames, as nothing would be compared.
    """
    if not frames:
        raise ValueError("dtype int8: there are no frames to compare the policy's answers on")
    model, fingerprint = policy.model, Fingerprint()
    for name, tensor in model.state_dict().items():
        fingerprint.add(name, tensor)
    model.backbone.unembedding = unembedding(model.backbone.embed_tokens)
    layers = {name: Measured(layer) for name, layer in linear_layers(model).items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    subtasks = _subtasks(policy, frames)
    expected = _chunks(policy, frames, subtasks)
    errors = {name: layer.error for name, layer in layers.items() if layer.ran}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)
    count = sum(error > MAX_LAYER_ERROR for error in errors.values())
    while True:
        kept = layers.keys() - set(worst[count:])
        for name, layer in layers.items():
            model.set_submodule(name, layer.layer if name in kept else layer.product)
        error = float(np.abs(_chunks(policy, frames, subtasks) - expected).max())
        is_alike = error <= MAX_ACTION_ERROR and _subtasks(policy, frames) == subtasks
        if is_alike or count == len(worst):
            if UNEMBEDDING in kept:
                model.backbone.unembedding = None
            return Choice(
                fingerprint=fingerprint.hexdigest(),
                way=Way(policy.robot, policy.acting.actions, policy.hierarchical),
                kept=tuple(sorted(kept)),
                errors=errors,
                action_error=error,
            )
        count = min(len(worst), count + -(-len(worst) // STEPS))


def _subtasks(policy: Inference, frames: Sequence[Frame]) -> Sequence[str | None]:
    """What it says before it acts on each frame."""
    return policy.predict_subtasks(frames) if policy.hierarchical else [None] * len(frames)


def _chunks(policy: Inference, frames: Sequence[Frame], subtasks: Sequence[str | None]) -> np.ndarray:
    """A chunk for each frame, from fixed noise where the flow head makes it, as shares of the actions' ranges."""
    config = policy.model.config
    noise = torch.randn(len(frames), config.horizon, config.action_dim, generator=torch.Generator().manual_seed(0))
    chunks = [
        policy.predict_chunks([frame], [subtask], noise[[i]])[0]
        for i, (frame, subtask) in enumerate(zip(frames, subtasks, strict=True))
    ]
    return np.stack(chunks) / policy.processor.robots[policy.robot].normalize.action.computed_unit
