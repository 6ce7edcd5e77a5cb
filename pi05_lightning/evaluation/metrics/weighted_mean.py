"""The one accumulator behind every metric: a weighted mean per element of an array."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class Sums:
    """Σ w·x and Σ w, f64 of one shape: what means over it, and over several datasets, follow from."""

    total: Tensor
    weight: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.total + other.total, self.weight + other.weight)

    def mean(self) -> Tensor:
        """Over all elements; NaN where nothing was counted."""
        return self.total.sum() / self.weight.sum()


class WeightedMean(Metric):
    """Mean of values by weight, per element of a shape; summed in float64 and over all ranks.

    What has no weight counts nowhere, even where it is NaN; NaN with a weight stays NaN and is not left out.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """values, weights: [... *shape], of any leading axes."""
        values, weights = values.to(self.total), weights.to(self.total)
        counted = torch.where(weights != 0, values * weights, 0.0)
        self.total += counted.reshape(-1, *self.shape).sum(0)
        self.weight += weights.reshape(-1, *self.shape).sum(0)

    def compute(self) -> tuple[Tensor, Tensor]:
        # torchmetrics squeezes what holds one element; `sums` gives it its axes back
        return self.total, self.weight

    def sums(self) -> Sums:
        """`compute`, with every axis."""
        total, weight = self.compute()
        return Sums(total.reshape(self.shape), weight.reshape(self.shape))
