"""Loss terms to one loss: means over an optimizer step, weighted and summed by name. And the random numbers of flows.

What a term is, its formula and its name, is its head's business (models/heads/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pi05_lightning.models.heads.base import Terms
from pi05_lightning.types import Batch

# Flow time: t = SCALE · Beta(ALPHA, 1) + OFFSET (π0, arXiv 2410.24164, eq. 4); the offset keeps t above 0.
TIME_ALPHA, TIME_SCALE, TIME_OFFSET = 1.5, 0.999, 0.001


def flow_time_quantile(probability: float) -> float:
    """The flow time below which a share of all draws lies; of Beta(α, 1) it is p^(1/α)."""
    return TIME_SCALE * probability ** (1 / TIME_ALPHA) + TIME_OFFSET


def draw_noise(
    key: Tensor, seed: int, draws: int, horizon: int, action_dim: int, max_delay: int = 0, steps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Noise f32[R K T D] and flow time f32[R K] for keys i64[R] on the CPU; row r depends on seed and key[r] alone.

    With max_delay, time is f32[R K T] and 0 for the first d actions of a draw, d uniform in 0..max_delay: these are
    given, as they are to a robot that executes them while the chunk is computed (arXiv 2512.05964).
    steps: of each row's chunk, i64[R], by default the horizon; the last one is never given, so that every draw teaches.
    """
    noise = np.empty((len(key), draws, horizon, action_dim), dtype=np.float32)
    time = np.empty((len(key), draws, 1), dtype=np.float32)
    delay = np.zeros((len(key), draws), dtype=np.int64)
    for row, k in enumerate(key.tolist()):
        rng = np.random.Generator(np.random.Philox(key=[seed % 2**63, k % 2**63]))
        noise[row] = rng.standard_normal((draws, horizon, action_dim), dtype=np.float32)
        time[row, :, 0] = TIME_SCALE * rng.beta(TIME_ALPHA, 1.0, draws) + TIME_OFFSET
        if max_delay:
            delay[row] = rng.integers(max_delay + 1, size=draws)
    if not max_delay:
        return torch.from_numpy(noise), torch.from_numpy(time[..., 0])
    if steps is not None:
        delay = np.minimum(delay, steps.numpy()[:, None] - 1)
    is_given = np.arange(horizon) < delay[..., None]
    return torch.from_numpy(noise), torch.from_numpy(np.where(is_given, np.float32(0), time))


def with_noise(batch: Batch, seed: int, draws: int = 1, max_delay: int = 0) -> Batch:
    """A batch on the host with noise and flow time, see `draw_noise`: no device generator, no synchronisation."""
    rows, horizon, dims = batch.actions.shape
    steps = batch.action_mask.any(-1).sum(-1)
    noise, time = draw_noise(batch.key[:rows], seed, draws, horizon, dims, max_delay, steps)
    return replace(batch, noise=noise, time=time)


def mean_terms(
    terms: Terms, counts: Mapping[str, Tensor], batches: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean of each term over all its elements in an optimizer step, and how many those are, on all ranks together.

    The mean of the batches' own means would weigh elements unequally, where batches have different numbers of them.
    What this gives for a batch is scaled so that its mean over the step's batches, which Lightning takes, and over
    ranks, which data-parallel strategies take, is the mean over all elements of the step, and so for gradients. Values
    are the same on every rank.

    terms: of this batch.  counts: elements of each term in the step's batches on this rank, of all terms that a batch
    or rank may have.  batches: how many the step accumulates.
    Every rank must call this: there is one small all-reduce, and no host synchronisation.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    zero = next(iter(counts.values())).new_zeros((), dtype=torch.float32)
    sums = {name: (term.values * term.mask).sum() for name, term in terms.items()}
    mine = torch.stack([sums.get(name, zero) for name in counts])
    everyone = torch.stack([mine.detach(), torch.stack(list(counts.values())).float()])
    if ranks > 1:
        dist.all_reduce(everyone)
    total, count = everyone
    means = ranks * batches * mine / count.clamp(min=1)
    if ranks > 1:
        means = means + (batches * total / count.clamp(min=1) - means).detach()
    return dict(zip(counts, means, strict=True)), dict(zip(counts, count, strict=True))


def weighted_sums(terms: Terms, weights: Mapping[str, float]) -> list[Tensor]:
    """Of each term of a batch, its weight times the sum over its elements."""
    return [weights[name] * (term.values * term.mask).sum() for name, term in terms.items()]


def total_loss(means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · mean over the terms that have a weight. Raises ValueError where there are none of them."""
    used = [weights[name] * mean for name, mean in means.items() if name in weights]
    if not used:
        raise nothing_to_learn(weights)
    return torch.stack(used).sum()


def nothing_to_learn(weights: Mapping[str, float]) -> ValueError:
    """The error of a step without an element of any term that its stage weighs."""
    return ValueError(
        f"this step has nothing that the stage trains on: its loss weights are {dict(weights)}; give one of them"
        " data in the stage's mixture, or a weight to what the mixture draws"
    )
