"""How good a model is, per dataset and modality: sums and counts, so that ranks and batch sizes do not matter."""

from pi05_lightning.evaluation.metrics.measure import Evaluator, Measured
from pi05_lightning.evaluation.metrics.modality import ModalityMetrics, compute_all

__all__ = ["Evaluator", "Measured", "ModalityMetrics", "compute_all"]
