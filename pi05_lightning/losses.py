"""Loss terms and their random numbers: which token counts for what, which action steps count, and noise by key."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.models.pi05 import Outputs
from pi05_lightning.recipe import LossWeights
from pi05_lightning.types import Batch, Loss

TOKEN_TERMS = {"text": Loss.TEXT, "subtask": Loss.SUBTASK, "fast": Loss.FAST}


def draw_noise(key: Tensor, seed: int, draws: int, horizon: int, action_dim: int) -> tuple[Tensor, Tensor]:
    """Noise f32[R K T D] and flow time f32[R K] for keys i64[R] on the CPU; row r depends on seed and key[r] alone.

    t ~ 0.999 · Beta(1.5, 1) + 0.001 (π0, eq. 4, which keeps t above 0).
    """
    noise = np.empty((len(key), draws, horizon, action_dim), dtype=np.float32)
    time = np.empty((len(key), draws), dtype=np.float32)
    for row, k in enumerate(key.tolist()):
        rng = np.random.Generator(np.random.Philox(key=[seed % 2**63, k % 2**63]))
        noise[row] = rng.standard_normal((draws, horizon, action_dim), dtype=np.float32)
        time[row] = 0.999 * rng.beta(1.5, 1.0, draws) + 0.001
    return torch.from_numpy(noise), torch.from_numpy(time)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values where mask, 0 where nothing is; no synchronisation."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def loss_terms(out: Outputs, batch: Batch) -> dict[str, Tensor]:
    """The unweighted terms that a forward pass computed: means over tokens of a kind, over unpadded action elements."""
    terms: dict[str, Tensor] = {}
    if out.tokens is not None:
        kind = batch.loss_kind.flatten()[batch.target_index]
        terms = {name: masked_mean(out.tokens.nll, kind == loss) for name, loss in TOKEN_TERMS.items()}
    if out.distance is not None:
        terms["location"] = out.distance.mean()
    if out.flow is not None:
        terms["flow"] = masked_mean(out.flow, batch.action_mask[:, None].expand_as(out.flow))
    return terms


def total_loss(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Σ weight · term over the terms that count."""
    used = [getattr(weights, name) * term for name, term in terms.items() if getattr(weights, name)]
    if not used:
        raise ValueError(
            f"this batch has nothing that the stage trains on: its loss weights are {weights}; give one of them data in"
            " the stage's mixture, or a weight to what the mixture draws"
        )
    return torch.stack(used).sum()
