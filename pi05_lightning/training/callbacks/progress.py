"""Progress as plain lines, for where a bar cannot be drawn: a log file, a batch job, a pipe."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.files.ranges import check_range
from pi05_lightning.module import Pi05Module


class ProgressLines(ProgressBar):
    """Prints step, stage, loss and speed every `seconds`, and when training ends; elsewhere what is looked at."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        check_range("ProgressLines: seconds", seconds, 0)
        self.seconds = seconds
        self._enabled = True
        self._last_time = self._first_time = 0.0
        self._first_step = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_time = self._first_time = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._enabled and time.monotonic() - self._last_time >= self.seconds:
            self._line(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and trainer.global_step > self._first_step:
            self._line(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._evaluated(trainer, "validation", [str(s) for s in datamodule_of(trainer).evaluated_subsets], *args[2:])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._evaluated(trainer, "test", [str(s) for s in datamodule_of(trainer).evaluated_subsets], *args[2:])

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._evaluated(trainer, "prediction", list(datamodule_of(trainer).predicted_sources), *args[2:])

    def _evaluated(self, trainer: Trainer, what: str, parts: list[str], batch: int, part: int = 0) -> None:
        now = time.monotonic()
        if self._enabled and now - self._last_time >= self.seconds:
            print(f"{what} of {parts[part]} ({part + 1} of {len(parts)}), batch {batch + 1}", flush=True)
            self._last_time = now

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        now, step = time.monotonic(), trainer.global_step
        speed = (step - self._first_step) / max(now - self._first_time, 1e-9)
        left = (trainer.max_steps - step) / speed if speed else float("nan")
        loss = trainer.progress_bar_metrics.get("loss")
        shown = f"loss {loss:.4g}  " if isinstance(loss, float) else ""
        stage = pl_module.recipe.at(max(step - 1, 0)).name
        print(f"step {step}/{trainer.max_steps}  {stage}  {shown}{speed:.3g} steps/s  {left:.0f} s left", flush=True)
        self._last_time = now
