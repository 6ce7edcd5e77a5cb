"""The debug model and the validation batches of a small recorded dataset, with FAST tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi05_lightning import Pi05DataModule
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.evaluation.metrics import Evaluator, SubsetMetrics, compute_all
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Batch, Subset
from tests.untrained import seeing, untrained_model

CONFIG = ModelConfig.preset("debug")


@pytest.fixture
def data(videos: Path, fast: Path) -> Pi05DataModule:
    source = LeRobotConfig(path=str(videos), val_fraction=0.2)
    return Pi05DataModule(
        {"robot": source}, batch_size=4, num_workers=0, fast=fast, shapes=CONFIG.shapes, val_samples=7
    )


@pytest.fixture
def evaluator(data: Pi05DataModule) -> Evaluator:
    return Evaluator(seeing(untrained_model()), data.processor, num_steps=2)


def batches(data: Pi05DataModule, name: str) -> list[Batch]:
    return list(data.val_dataloader()[data.evaluated_subsets.index(Subset.parse(name))])


def values(evaluator: Evaluator, name: str, *given: Batch) -> dict[str, float]:
    """The metrics of some batches."""
    subset = Subset.parse(name)
    metrics = SubsetMetrics(subset, evaluator.model)
    for batch in given:
        metrics.update(evaluator.measure(batch, subset))
    return compute_all({subset: metrics})[name]
