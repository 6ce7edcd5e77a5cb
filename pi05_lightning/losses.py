"""Loss terms to one loss: means over all ranks, weighted and summed by name. And the random numbers of flow matching.

What a term is, its formula and its name, is its head's business (models/heads/).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pi05_lightning.models.heads.base import Terms

# Flow time: t = SCALE · Beta(ALPHA, 1) + OFFSET (π0, arXiv 2410.24164, eq. 4); the offset keeps t above 0.
TIME_ALPHA, TIME_SCALE, TIME_OFFSET = 1.5, 0.999, 0.001


def flow_time_quantile(probability: float) -> float:
    """The flow time below which a share of all draws lies; of Beta(α, 1) it is p^(1/α)."""
    return TIME_SCALE * probability ** (1 / TIME_ALPHA) + TIME_OFFSET


def draw_noise(
    key: Tensor, seed: int, draws: int, horizon: int, action_dim: int, max_delay: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise f32[R K T D] and flow time f32[R K] for keys i64[R] on the CPU; row r depends on seed and key[r] alone.

    With max_delay, time is f32[R K T] and 0 for the first d actions of a draw, d uniform in 0..max_delay: these are
    given, as they are to a robot that executes them while the chunk is computed (arXiv 2512.05964).
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
    is_given = np.arange(horizon) < delay[..., None]
    return torch.from_numpy(noise), torch.from_numpy(np.where(is_given, np.float32(0), time))


def mean_terms(terms: Terms, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The mean of each term over what counts.

    With several ranks the means are over all of them together, see `mean_over_ranks`; every rank must call this, with
    the same `names` of all terms that any of them may have.
    """
    sums = {name: (term.values * term.mask).sum() for name, term in terms.items()}
    counts = {name: term.mask.sum().float() for name, term in terms.items()}
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return mean_over_ranks(sums, counts, list(names), device)
    return {name: sums[name] / counts[name].clamp(min=1) for name in sums}


def mean_over_ranks(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], names: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Means over the elements of all ranks, with one small all-reduce and no host synchronisation.

    A mean of the ranks' own means would weigh an element by how few others its rank has. Values are the same on every
    rank; gradients are such that their mean over ranks, which data-parallel strategies take, is the gradient of it.
    """
    zero = torch.zeros((), device=device)
    mine = torch.stack([sums.get(name, zero) for name in names])
    everyone = torch.stack([mine.detach(), torch.stack([counts.get(name, zero) for name in names])])
    dist.all_reduce(everyone)
    total, count = everyone[0], everyone[1].clamp(min=1)
    mine = dist.get_world_size() * mine / count
    return dict(zip(names, (mine + (total / count - mine).detach()).unbind(), strict=True))


def total_loss(means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · mean over the terms that have a weight. Raises ValueError where the batch has none of them."""
    used = [weights[name] * mean for name, mean in means.items() if name in weights]
    if not used:
        raise ValueError(
            f"this batch has nothing that the stage trains on: its loss weights are {dict(weights)}; give one of them"
            " data in the stage's mixture, or a weight to what the mixture draws"
        )
    return torch.stack(used).sum()
