"""The metrics of one validation, over all subsets of its data."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.evaluation.metrics import Evaluator, Measured, Questions, SubsetMetrics, compute_all, metric_names
from pi05_lightning.evaluation.metrics.questions import Table
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Modality

log = logging.getLogger(__name__)


class Validation:
    """Sums of what the batches of each subset were measured as. device: where they are summed."""

    def __init__(self, data: Pi05DataModule, model: Pi05, device: torch.device) -> None:
        self.subsets = data.evaluated_subsets
        subsets = [*self.subsets, *data.empty_subsets]
        self.metrics = {subset: SubsetMetrics(subset, model, device) for subset in subsets}
        self._questions = {subset: Questions() for subset in self.subsets if subset.modality is Modality.QA}

    def add(self, batch: Batch, loader: int, evaluator: Evaluator) -> Measured | None:
        """Measure a batch of one of the data's loaders; None where all its samples were bad, and are left out."""
        assert batch.drawn is not None
        for problem in batch.drawn.skipped:
            log.warning("left out of what is measured: %s", problem)
        if not batch.drawn.names:
            return None
        subset = self.subsets[loader]
        measured = evaluator.measure(batch, subset)
        self.metrics[subset].update(measured)
        if subset in self._questions:
            self._questions[subset].update(measured)
        return measured

    def results(self) -> dict[str, dict[str, float]]:
        """As `compute_all` gives them; collective."""
        return compute_all(self.metrics)

    def by_question(self) -> dict[str, Table]:
        """`source/qa` -> its table, where a question was asked more than once; collective."""
        tables = {str(subset): questions.table() for subset, questions in self._questions.items()}
        return {name: table for name, table in tables.items() if table}


def by_tag(results: Mapping[str, Mapping[str, float]], split: str) -> dict[str, float]:
    """By the tags that results are logged under."""
    return {
        f"{split}{'_detail' if '/' in metric else ''}/{name}/{metric}": float(value)
        for name, metrics in results.items()
        for metric, value in metrics.items()
    }


def tags(data: Pi05DataModule, model: Pi05) -> list[str]:
    """What validation of the data can log, before it has."""
    return list(by_tag(metric_names(data.evaluated_subsets, data.empty_subsets, model), data.evaluated))
