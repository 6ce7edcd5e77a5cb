"""Ctrl-C between two steps, so that what is saved then is the state after a whole step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pi05_lightning.training.callbacks.checkpoint import within_step


class InterruptBetweenSteps(Callback):
    """Holds a first Ctrl-C back until the training or validation step under way has ended; a second one acts at once.

    Inside an optimizer step an interrupt would leave half of the parameters updated, and the checkpoint that
    `ModelCheckpoint(save_on_exception=True)` writes could not be resumed exactly. With several ranks Lightning's own
    handling stays: they could not agree on the step without a collective in every one.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: signal._HANDLER | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            self.previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self._restore()
        self.requested = True
        rank_zero_info("\nInterrupted: saving after this step. Once more to stop at once.")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.requested and not within_step(trainer):
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def _restore(self, *args: Any, **kwargs: Any) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    on_exception = teardown = _restore
