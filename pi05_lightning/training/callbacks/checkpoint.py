"""When a run is saved, and that what is saved can be resumed exactly whenever the run is killed."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pi05_lightning.files.local import replacing
from pi05_lightning.finite import NotFinite
from pi05_lightning.training.callbacks.interrupt import Stopped, requeue, within_step
from pi05_lightning.training.checkpoint_io import AtomicCheckpointIO, check_readable
from pi05_lightning.training.first_rank import on_first_rank


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint for runs that may be killed at any moment.

    Upstream leaves out the steps after the last multiple of `every_n_train_steps`; for a moment has no `last.ckpt`;
    and, when one of several ranks fails, waits for the others to save with it. What is saved between two batches whose
    gradients are accumulated is the state after the last whole step, and a resumed run does the next one anew.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:  # upstream's is the first logger's, which may be anywhere
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no other was asked for
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError for what could not be read again, hours before the first checkpoint is due."""
        super().on_train_start(trainer, pl_module)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        on_first_rank(trainer, partial(check_readable, checkpoint))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NotFinite):
            if not exception.intact:
                return
            take_back_batches(trainer)
        # a signal stops all ranks after the same step; of another error nobody knows whether all have it
        if trainer.world_size == 1 or isinstance(exception, Stopped | NotFinite):
            super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Stopped) and exception.requeued and trainer.is_global_zero:
            requeue()

    def _should_save_on_exception(self, trainer: Trainer) -> bool:
        return not within_step(trainer) and super()._should_save_on_exception(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link":  # before upstream removes the checkpoint that it points to
            last = os.path.join(str(self.dirpath), self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)
            self._link_checkpoint(trainer, filepath, last)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and filepath != linkpath:
            with replacing(Path(linkpath), one_writer=True) as new:
                new.symlink_to(os.path.relpath(filepath, new.parent))
        trainer.strategy.barrier()


def take_back_batches(trainer: Any) -> None:
    """Count no batch of the step under way, which is not taken: a resumed run draws all of them again."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    unused = progress.current.processed % trainer.accumulate_grad_batches
    for count in (progress.current, progress.total):
        count.processed -= unused
        count.ready = count.started = count.completed = count.processed
