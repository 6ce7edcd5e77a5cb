"""Which layers of a policy compute in 8 bits: all whose errors leave its actions as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from pi05_lightning.acting.frames import made_up_frames, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.acting.options import Acting
from pi05_lightning.models.int8 import REST, Measured, check_int8, linear_layers
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Frame
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.int8 import Choice, Fingerprint, int8_model

logger = logging.getLogger(__name__)

MAX_LAYER_ERROR = 0.1
"""Of a layer's output. Rounding alone gives 0.015; more is a matter of a few values that are far from all others."""
MAX_ACTION_ERROR = 0.02
"""Of the range q99 - q01 of an action's dimension."""
STEPS = 16  # in so many steps all layers would be taken back
RECORDED = 8  # frames


def int8_weights(weights: Weights, acting: Acting) -> Pi05:
    """The model of a policy's weights that computes in 8 bits, as the choice beside them says.

    Where there is none, it is made from the answers to a few frames, and written.  acting: as which robot.
    Raises ValueError for a choice that was made of other weights, and where this machine has no 8-bit products.
    """
    check_int8()
    file = Choice.file(weights)
    if file.is_file():
        choice, found = Choice.read(file), Fingerprint()
        model = int8_model(weights, choice.kept, found)
        if found.hexdigest() != choice.fingerprint:
            raise ValueError(f"{file} was measured on other weights than {weights.path}: delete it to measure anew")
        return model
    logger.info("measuring which layers can compute in 8 bits")
    how = Acting(robot=acting.robot, actions=acting.actions, hierarchical=acting.hierarchical)
    policy = Inference(weights.model(REST), weights.processor(), how, trained=weights.trained)
    choice = choose(policy, [*recorded_frames(policy, None, RECORDED), *made_up_frames(policy)])
    total = len(choice.errors)
    logger.info(
        "%d of %d layers compute in 8 bits; actions differ by %.2g of their range at most",
        total - len(choice.kept),
        total,
        choice.action_error,
    )
    try:
        choice.write(file)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next start measures anew", file, error)
    return policy.model


def choose(policy: Inference, frames: Sequence[Frame]) -> Choice:
    """Have a policy compute in 8 bits where its answers to frames allow, in place.

    Those layers are left out whose own error is above `MAX_LAYER_ERROR`, and then the worst ones, until no action is
    further than `MAX_ACTION_ERROR` from what it was.
    """
    model, fingerprint = policy.model, Fingerprint()
    for name, tensor in model.state_dict().items():
        fingerprint.add(name, tensor)
    layers = {name: Measured(layer) for name, layer in linear_layers(model).items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    subtasks = policy.predict_subtasks(frames) if policy.hierarchical else [None] * len(frames)
    expected = _actions(policy, frames, subtasks)
    errors = {name: layer.error for name, layer in layers.items()}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)
    count = sum(error > MAX_LAYER_ERROR for error in errors.values())
    while True:
        kept = set(worst[:count])
        for name, layer in layers.items():
            model.set_submodule(name, layer.layer if name in kept else layer.product)
        error = float(np.abs(_actions(policy, frames, subtasks) - expected).max(initial=0))
        if error <= MAX_ACTION_ERROR or count == len(worst):
            return Choice(fingerprint.hexdigest(), tuple(sorted(kept)), errors, error)
        count = min(len(worst), count + -(-len(worst) // STEPS))


def _actions(policy: Inference, frames: Sequence[Frame], subtasks: Sequence[str | None]) -> np.ndarray:
    """A chunk of the flow head for each frame, from fixed noise, as shares of the actions' ranges."""
    if not policy.abilities.flow:
        return np.zeros(0)
    policy, config = policy.acting_as(Acting(robot=policy.robot)), policy.model.config
    noise = torch.randn(len(frames), config.horizon, config.action_dim, generator=torch.Generator().manual_seed(0))
    chunks = [
        policy.predict_chunks([frame], [subtask], noise[[i]])[0]
        for i, (frame, subtask) in enumerate(zip(frames, subtasks, strict=True))
    ]
    return np.stack(chunks) / policy.processor.robots[policy.robot].normalize.action.span
