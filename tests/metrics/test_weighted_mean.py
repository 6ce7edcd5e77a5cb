import math

import pytest
import torch

from pi05_lightning.evaluation.metrics.weighted_mean import WeightedMean


def test_mean_of_two_updates_is_weighted_by_what_each_counted() -> None:
    mean = WeightedMean()
    mean.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    mean.update(torch.tensor([6.0]), torch.tensor([2.0]))
    assert float(mean.sums().mean()) == (1 + 2 + 6 * 2) / 4


def test_sums_are_kept_per_element_and_have_one_mean() -> None:
    mean = WeightedMean(2, 2)
    mean.update(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1, 1], [1, 0]]]))
    sums = mean.sums()
    assert sums.total.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert sums.weight.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert float(sums.mean()) == 2.0  # (1 + 2 + 3) / 3


def test_nothing_counted_is_no_number() -> None:
    assert math.isnan(WeightedMean().sums().mean())


def test_nan_without_weight_counts_nowhere() -> None:
    mean = WeightedMean()
    mean.update(torch.tensor([torch.nan, 3.0]), torch.tensor([False, True]))
    assert float(mean.sums().mean()) == 3.0


def test_nan_with_weight_is_not_left_out() -> None:
    mean = WeightedMean()
    mean.update(torch.tensor([torch.nan, 3.0]), torch.tensor([True, True]))
    assert math.isnan(mean.sums().mean())


def test_million_small_values_lose_nothing() -> None:
    mean = WeightedMean()
    for _ in range(10):
        mean.update(torch.full((100_000,), 0.1), torch.ones(100_000))
    assert float(mean.sums().mean()) == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
