"""What a run was stopped in is made up when it goes on: a validation, and Lightning's counters inside a batch."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker as ProcessedTracker

from pi05_lightning.training.callbacks.interrupt import within_batch

PENDING = "validation_is_pending"


class Restart(Callback):
    """Runs the validation that was due when a checkpoint was saved and was not over, once, before training goes on.

    Upstream leaves it out, and at a run's last step does nothing at all; it also counts a batch twice that an exception
    ended, and a step too little for the loggers. A callback that has something to make up itself says so by
    `is_pending`, so that a run goes on that has taken all its steps.
    """

    def __init__(self) -> None:
        self.is_pending = False
        self._validated = -1
        """Batches trained on when the last validation was over."""
        self._resumed_at: int | None = None
        self._max_steps = -1

    # --- saving

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = batches(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        due = self.is_pending or (not within_batch(trainer) and validation_is_due(trainer))
        checkpoint[PENDING] = due and self._validated != batches(trainer)

    # --- going on

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.is_pending, self._resumed_at = checkpoint.get(PENDING, False), checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._max_steps = trainer.max_steps
        is_pending = any(getattr(callback, "is_pending", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if is_pending and self._resumed_at is not None and 0 <= trainer.max_steps <= self._resumed_at:
            trainer.fit_loop.epoch_loop.max_steps = self._resumed_at + 1  # else not even `on_train_start` comes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        epoch_loop.max_steps = self._max_steps
        total = cast("ProcessedTracker", epoch_loop.batch_progress.total)
        total.ready = total.started = total.processed  # upstream takes back the count of this epoch alone
        if self.is_pending and trainer.enable_validation:
            loop = epoch_loop.val_loop
            loop.restarting = False  # from its first batch on
            trainer.validating = True
            loop.run()
            trainer.training = True
        self.is_pending = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._resumed_at is not None:
            # what validation is logged at; upstream forgets a step that was saved after its validation
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._resumed_at = None


def batches(trainer: Trainer) -> int:
    """Batches trained on since the beginning of the run."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that was just trained on, by Lightning's own decision."""
    fetcher = trainer.fit_loop._data_fetcher
    return (
        fetcher is not None
        and any(trainer.num_val_batches)
        and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    )
