"""Errors of an action chunk, per element: means over samples, dims and steps are left to those who read them."""

from __future__ import annotations

import torch
from torch import Tensor

from pi05_lightning.data.transforms import Quantiles

NORMALIZED_RANGE = 2.0  # of [-1, 1]
CHUNK_METRICS = ("action_mse", "action_mae", "action_accuracy", "action_mse_real", "action_mae_real")


def chunk_errors(
    chunk: Tensor, truth: Tensor, mask: Tensor, quantiles: Quantiles, threshold: float
) -> tuple[Tensor, Tensor]:
    """The values that CHUNK_METRICS names, f32[B 5 T D], and where they count, bool[B 5 T D].

    chunk, truth f32[B T D] are normalised, mask bool[B T D] is False on padded steps and dims.  threshold: the largest
    error that counts as right, as a share of the normalised range.
    """
    error = chunk - truth
    dims = len(quantiles)
    real = torch.zeros_like(error)
    predicted, true = (quantiles.unnormalize(x[..., :dims].cpu().numpy()) for x in (chunk, truth))
    real[..., :dims] = torch.from_numpy(predicted - true).to(error.device)
    right = (error.abs() <= threshold * NORMALIZED_RANGE).to(error)
    # an error that is no number is not a wrong value but an unknown one, and has to show
    right = torch.where(error.isfinite(), right, error)
    errors = torch.stack([error.square(), error.abs(), right, real.square(), real.abs()], dim=1)
    return errors, mask[:, None].expand_as(errors)
