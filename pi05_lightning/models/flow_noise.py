"""The random numbers that a flow is trained with: noise and flow time, drawn of each sample by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

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
