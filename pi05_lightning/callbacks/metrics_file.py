"""What `pi05 validate` and `pi05 test` leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

FILES = {TrainerFn.VALIDATING: "metrics.json", TrainerFn.TESTING: "test_metrics.json"}


class MetricsFile(Callback):
    """Writes what was measured into the run's metrics.json: `source/modality` -> metric -> value.

    A value that is not a finite number is null. Validation in the middle of training is in the event files alone.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        if trainer.state.fn not in FILES:
            return
        metrics: dict[str, dict[str, float | None]] = {}
        for name, value in trainer.callback_metrics.items():
            _, _, address = name.partition("/")  # val/source/modality/metric
            modality, _, metric = address.rpartition("/")
            metrics.setdefault(modality, {})[metric] = value.item() if math.isfinite(value) else None
        file = Path(trainer.default_root_dir, FILES[trainer.state.fn])
        file.write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        rank_zero_info(f"metrics written to {file}")
