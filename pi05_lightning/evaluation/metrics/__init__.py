"""How good a model is, per dataset and modality: sums and counts, so that ranks and batch sizes do not matter."""

from pi05_lightning.evaluation.metrics.measure import Evaluator, Measured
from pi05_lightning.evaluation.metrics.questions import Questions
from pi05_lightning.evaluation.metrics.subset import SHARES, SubsetMetrics, compute_all, metric_names

__all__ = ["SHARES", "Evaluator", "Measured", "Questions", "SubsetMetrics", "compute_all", "metric_names"]
