"""Loss terms and their random numbers: which token counts for what, which action steps count, and noise by key."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pi05_lightning.models.pi05 import Outputs
from pi05_lightning.recipe import LossWeights
from pi05_lightning.types import Batch, Target

TOKEN_TERMS = {"text": Target.TEXT, "subtask": Target.SUBTASK, "fast": Target.FAST}
TERMS = (*TOKEN_TERMS, "location", "flow")


def draw_noise(
    key: Tensor, seed: int, draws: int, horizon: int, action_dim: int, max_delay: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise f32[R K T D] and flow time f32[R K] for keys i64[R] on the CPU; row r depends on seed and key[r] alone.

    t ~ 0.999 · Beta(1.5, 1) + 0.001 (π0, eq. 4, which keeps t above 0).
    With max_delay, time is f32[R K T] and 0 for the first d actions of a draw, d uniform in 0..max_delay: these are
    given, as they are to a robot that executes them while the chunk is computed (arXiv 2512.05964).
    """
    noise = np.empty((len(key), draws, horizon, action_dim), dtype=np.float32)
    time = np.empty((len(key), draws, 1), dtype=np.float32)
    delay = np.zeros((len(key), draws), dtype=np.int64)
    for row, k in enumerate(key.tolist()):
        rng = np.random.Generator(np.random.Philox(key=[seed % 2**63, k % 2**63]))
        noise[row] = rng.standard_normal((draws, horizon, action_dim), dtype=np.float32)
        time[row, :, 0] = 0.999 * rng.beta(1.5, 1.0, draws) + 0.001
        if max_delay:
            delay[row] = rng.integers(max_delay + 1, size=draws)
    if not max_delay:
        return torch.from_numpy(noise), torch.from_numpy(time[..., 0])
    is_given = np.arange(horizon) < delay[..., None]
    return torch.from_numpy(noise), torch.from_numpy(np.where(is_given, np.float32(0), time))


def flow_mask(batch: Batch) -> Tensor:
    """Which elements of the velocity count, bool[R K|1 T D]: neither padding nor actions that were given (t = 0)."""
    assert batch.time is not None
    mask = batch.action_mask[:, None]
    return mask & (batch.time > 0)[..., None] if batch.time.ndim == 3 else mask


def loss_terms(out: Outputs, batch: Batch) -> dict[str, Tensor]:
    """The unweighted terms that a forward pass computed: means over tokens of a kind, over unpadded action elements.

    With several ranks the means are over all of them together, see `mean_over_ranks`; every rank must call this.
    """
    masked: dict[str, tuple[Tensor, Tensor]] = {}
    if out.tokens is not None:
        kind = batch.target_kind.flatten()[batch.target_index]
        masked = {name: (out.tokens.nll, kind == loss) for name, loss in TOKEN_TERMS.items()}
    if out.distance is not None:
        masked["location"] = (out.distance, torch.ones_like(out.distance))
    if out.flow is not None:
        masked["flow"] = (out.flow, flow_mask(batch).expand_as(out.flow))
    sums = {name: (values * mask).sum() for name, (values, mask) in masked.items()}
    counts = {name: mask.sum().float() for name, (_, mask) in masked.items()}
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return mean_over_ranks(sums, counts, batch.tokens.device)
    return {name: sums[name] / counts[name].clamp(min=1) for name in sums}


def mean_over_ranks(sums: dict[str, Tensor], counts: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Means of all TERMS over the elements of all ranks, with one small all-reduce and no host synchronisation.

    A mean of the ranks' own means would weigh an element by how few others its rank has. Values are the same on every
    rank; gradients are such that their mean over ranks, which data-parallel strategies take, is the gradient of it.
    """
    zero = torch.zeros((), device=device)
    mine = torch.stack([sums.get(name, zero) for name in TERMS])
    everyone = torch.stack([mine.detach(), torch.stack([counts.get(name, zero) for name in TERMS])])
    dist.all_reduce(everyone)
    total, count = everyone[0], everyone[1].clamp(min=1)
    mine = dist.get_world_size() * mine / count
    return dict(zip(TERMS, (mine + (total / count - mine).detach()).unbind(), strict=True))


def total_loss(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Σ weight · term over the terms that count."""
    used = [getattr(weights, name) * term for name, term in terms.items() if getattr(weights, name)]
    if not used:
        raise ValueError(
            f"this batch has nothing that the stage trains on: its loss weights are {weights}; give one of them data in"
            " the stage's mixture, or a weight to what the mixture draws"
        )
    return torch.stack(used).sum()
