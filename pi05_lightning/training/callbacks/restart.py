"""What a run was stopped in is made up when it goes on: a validation that was due and not over."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.training.callbacks.interrupt import within_batch

PENDING = "validation_is_pending"


class Restart(Callback):
    """Runs the validation that was due when a checkpoint was saved and was not over, once, before training goes on.

    Upstream leaves it out, does nothing at all where a run has taken its last step, and may log later validations a
    step too early. A callback that has something to make up by itself says so as this one does, by `is_pending`.
    """

    def __init__(self) -> None:
        self.is_pending = False
        self._validated = -1
        """Batches trained on when no validation was due any more."""
        self._resumed_at: int | None = None
        self._max_steps = -1

    # --- saving

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated, self.is_pending = batches(trainer), False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._resumed_at is None:
            is_over = within_batch(trainer) or self._validated == batches(trainer)
            checkpoint[PENDING] = not is_over and validation_is_due(trainer)
        else:  # it has not gone on yet
            checkpoint[PENDING] = self.is_pending

    # --- going on

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.is_pending, self._resumed_at = checkpoint.get(PENDING, False), checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._max_steps = trainer.max_steps
        if anything_is_pending(trainer) and self._resumed_at is not None and 0 <= trainer.max_steps <= self._resumed_at:
            trainer.fit_loop.epoch_loop.max_steps = self._resumed_at + 1  # else not even `on_train_start` comes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        epoch_loop.max_steps = self._max_steps
        if self.is_pending and trainer.enable_validation:
            loop = epoch_loop.val_loop
            loop.restarting = False  # from its first batch on
            epoch_loop._batches_that_stepped = trainer.global_step - 1  # what it is logged at, counted from 0
            trainer.validating = True
            loop.run()
            trainer.training = True
        self.is_pending = False
        self._validated = batches(trainer)  # what was due before is over

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._resumed_at is not None:
            # upstream forgets a step that was saved after its validation
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._resumed_at = None


def anything_is_pending(trainer: Any) -> bool:
    """Whether a callback has something to make up when training starts."""
    return any(getattr(callback, "is_pending", False) for callback in trainer.callbacks)


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
