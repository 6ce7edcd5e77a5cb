"""Errors of action chunks, by hand: one sample of two steps and two dims, padded to three dims."""

import numpy as np
import pytest
import torch

from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.evaluation.metrics.chunk import CHUNK_METRICS, chunk_errors
from pi05_lightning.evaluation.metrics.subset import values_of
from pi05_lightning.evaluation.metrics.weighted_mean import Sums, WeightedMean

TRUTH = torch.tensor([[[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]]])
PREDICTED = torch.tensor([[[0.1, 0.4, 9.0], [0.8, -1.0, 9.0]]])
MASK = torch.tensor([[[True, True, False], [True, True, False]]])
# real units: dim 0 spans 4 (errors × 2), dim 1 spans 20 (errors × 10)
QUANTILES = Quantiles(np.array([-2.0, 0.0]), np.array([2.0, 20.0]))


def measured(
    mask: torch.Tensor = MASK, predicted: torch.Tensor = PREDICTED, threshold: float = 0.1
) -> dict[str, float]:
    mean = WeightedMean(len(CHUNK_METRICS), 2, 3)
    mean.update(*chunk_errors(predicted, TRUTH, mask, QUANTILES, threshold))
    one = torch.ones((), dtype=torch.float64)
    return values_of({"samples": Sums(one, one), "chunk": mean.sums()}, details=True)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("action_mae", (0.1 + 0.4 + 0.2 + 0) / 4),
        ("action_mse", (0.01 + 0.16 + 0.04 + 0) / 4),
        ("action_accuracy", 3 / 4),  # within 0.1 of the range's width, which is 2: 0.4 is not
        ("action_mae_real", (0.2 + 4 + 0.4 + 0) / 4),
        ("action_mse_real", (0.04 + 16 + 0.16 + 0) / 4),
        ("action_mae/dim_00", (0.1 + 0.2) / 2),
        ("action_mae/dim_01", (0.4 + 0) / 2),
        ("action_mae/step_00", (0.1 + 0.4) / 2),
        ("action_mae/step_01", (0.2 + 0) / 2),
        ("action_mae_real/dim_01", (4 + 0) / 2),
        ("action_mse_real/step_00", (0.04 + 16) / 2),
        ("action_accuracy/dim_01", 1 / 2),
    ],
)
def test_error_is_what_it_is_by_hand(metric: str, expected: float) -> None:
    assert measured()[metric] == pytest.approx(expected, abs=1e-6)


def test_padded_dims_count_nowhere() -> None:
    assert "action_mae/dim_02" not in measured()


def test_padded_steps_count_nowhere() -> None:
    mask = MASK.clone()
    mask[:, 1] = False
    values = measured(mask)
    assert values["action_mae"] == pytest.approx(0.25)
    assert "action_mae/step_01" not in values


@pytest.mark.parametrize(("threshold", "accuracy"), [(0.04, 0.25), (0.06, 0.5), (0.21, 1.0)])
def test_accuracy_counts_errors_up_to_the_threshold(threshold: float, accuracy: float) -> None:
    assert measured(threshold=threshold)["action_accuracy"] == accuracy


@pytest.mark.parametrize("metric", CHUNK_METRICS)
def test_action_that_is_no_number_shows_in_every_metric(metric: str) -> None:
    predicted = PREDICTED.clone()
    predicted[0, 0, 0] = torch.nan
    assert np.isnan(measured(predicted=predicted)[metric])
