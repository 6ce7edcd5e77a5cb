"""When a run is saved and by which score, and that it can be resumed exactly whenever it is killed."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pi05_lightning.files.local import replacing
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.callback_states import keep_best
from pi05_lightning.module.finite import StepNotFinite
from pi05_lightning.module.trainer import leaves_nothing
from pi05_lightning.ranks import by_first_rank
from pi05_lightning.training.callbacks.ema import validates_average
from pi05_lightning.training.callbacks.interrupt import Stopped, requeue, within_batch, within_step
from pi05_lightning.training.callbacks.monitored import check_monitored
from pi05_lightning.training.callbacks.restart import anything_is_pending, validation_is_due
from pi05_lightning.training.checkpoint_io import AtomicCheckpointIO, ShardedCheckpointIO, is_local
from pi05_lightning.training.run_directory import check_shared
from pi05_lightning.weights.readable import check_readable, free_bytes
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint, checkpoints_in, is_checkpoint

log = logging.getLogger(__name__)


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint for runs that may be killed at any moment, whose scores are of the weights in the same file.

    The run is saved every `every_n_train_steps` and at its end; `last.ckpt` is the newest. A step that a validation
    follows is saved once that is over. With `monitor`, what is saved so is `last.ckpt` alone, and each validation
    decides by its own result whether its weights are among the `save_top_k` best. Metrics in `filename` are nan for
    weights that were not validated.

    Upstream leaves out the steps after the last multiple of `every_n_train_steps`; for a moment has no `last.ckpt`;
    when one of several ranks fails, waits for the others to save with it; scores weights by the validation before them;
    with `monitor` saves none but the best; and forgets these when the run's directory is moved. What is saved between
    two batches whose gradients are accumulated is the state after the last whole step, and a resumed run does the next
    one anew.

    Of a sharded run checkpoints are directories. None of them is written over another one, which no file system does at
    once, so that `last.ckpt` is always a link there.

    Args:
        dirpath: the folder of the checkpoints; by default the run's checkpoints/.
        filename: a checkpoint's name without .ckpt, in which {step} and metrics, as {val/flow_loss}, are filled in.
        in_background: training goes on while a sharded run's checkpoint is written, from a copy of each rank's shards
            in the host's memory. The next one waits for it, and so does the end of the run.
        options: ModelCheckpoint's.

    Raises ValueError when training starts for a `monitor`, of another callback too, or a name in `filename` that
    nothing will log, for a `mode` that keeps the worst, and where another checkpoint callback would write the same
    files.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        *,
        in_background: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dirpath, filename, **options)
        self.in_background = in_background

    _is_deferred = False
    """This step is to be saved once its validation is over."""
    _was_pending = False
    """What this run was stopped in is made up when training starts."""
    _validated_step = -1
    _before_validation: frozenset[str] = frozenset()
    _validation_metrics: frozenset[str] = frozenset()
    """Names of what validation logs, as far as it did."""
    _is_updating = False
    """The optimizer is about to update the weights, or has, in this batch."""
    _loaded_step = -1
    """What this run goes on from."""
    _goes_on = False
    """A run that was scored by this metric before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:  # upstream's is the first logger's, which may be anywhere
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)
        checkpoint_io = trainer.strategy.checkpoint_io
        if isinstance(checkpoint_io, ShardedCheckpointIO):
            checkpoint_io.in_background = self.in_background
        elif self.in_background and stage == "fit":
            raise ValueError(
                "checkpoint.in_background is for sharded runs (trainer.strategy fsdp2), and this is none: leave it out"
            )
        elif type(checkpoint_io) is TorchCheckpointIO:  # no other was asked for
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        checkpoint_io = trainer.strategy.checkpoint_io
        if isinstance(checkpoint_io, AtomicCheckpointIO) and isinstance(pl_module, Pi05Module):
            checkpoint_io.evaluated = None if stage == "fit" else pl_module.model
            checkpoint_io.averaged = validates_average(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        by_first_rank(partial(self._link_newest, trainer))
        self._was_pending = anything_is_pending(trainer)
        if self.monitor is not None:
            # a run may go on from before some were removed
            keep_best(self, [path for path in self.best_k_models if self.file_exists(path, trainer)])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError for what could not be read again, hours before the first checkpoint is due."""
        super().on_train_start(trainer, pl_module)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        by_first_rank(partial(check_readable, checkpoint))
        if trainer.is_global_zero and self.dirpath is not None and is_local(self.dirpath):
            warn_of_little_room(Path(self.dirpath), checkpoint, pl_module)
        self._check_files(trainer)
        check_monitored(self, trainer, pl_module, self._validation_metrics, self._goes_on)
        if trainer.world_size > 1 and not leaves_nothing(trainer) and is_local(self.dirpath):
            check_shared(Path(str(self.dirpath)))
        if self._was_pending and not self._should_skip_saving_checkpoint(trainer):
            self._save_newest(trainer)  # it is made up, which no later start is to do again

    # --- when it saves

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._is_deferred = self._is_updating = False
        if within_step(trainer) or self._should_skip_saving_checkpoint(trainer) or not self._is_time(trainer):
            return
        if validation_is_due(trainer):
            self._is_deferred = True
        else:
            self._save_newest(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        self._is_updating = True

    def _is_time(self, trainer: Trainer) -> bool:
        if self._train_time_interval is None:
            return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        now, last = time.monotonic(), self._last_time_checked
        is_time = last is None or now - last >= self._train_time_interval.total_seconds()
        if trainer.strategy.broadcast(is_time):  # the ranks' clocks differ
            self._last_time_checked = now
            return True
        return False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = frozenset(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_metrics |= frozenset(trainer.callback_metrics) - self._before_validation
        is_deferred, self._is_deferred = self._is_deferred, False
        if trainer.sanity_checking or trainer.state.fn != "fit" or leaves_nothing(trainer):
            return
        self._validated_step = trainer.global_step
        if self.monitor is not None:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            if is_deferred or self._last_global_step_saved == trainer.global_step:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        elif is_deferred:
            self._save_newest(trainer)
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_newest(trainer)
        wait(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        is_resumed = trainer.global_step == self._loaded_step and not isinstance(exception, Stopped)
        if trainer.train_dataloader is None or is_resumed:  # its state may be restored in part, or refused
            is_whole = False
        elif isinstance(exception, StepNotFinite):
            is_whole = exception.intact
        else:  # it may have come while the optimizer updates the weights, as where a loader's process is killed
            is_updating = self._is_updating or isinstance(exception, KeyboardInterrupt)
            is_whole = not (is_updating and within_batch(trainer))
        # a signal stops all ranks after the same step; of another error nobody knows whether all have it
        is_everywhere = trainer.world_size == 1 or isinstance(exception, Stopped | StepNotFinite)
        if is_whole and is_everywhere and self._should_save_on_exception(trainer):
            if within_batch(trainer) or within_step(trainer):
                take_back_batches(trainer)
            self._save_newest(trainer)
            if self._last_global_step_saved != trainer.global_step:  # it keeps the best alone
                path = self._get_metric_interpolated_filepath_name(self._monitor_candidates(trainer), trainer)
                self._save_checkpoint(trainer, path)
            wait(trainer)
            rank_zero_info(f"{type(exception).__name__}: step {trainer.global_step} is saved in {self.dirpath}")
        if isinstance(exception, Stopped) and exception.requeued:
            if trainer.is_global_zero:
                requeue()
            trainer.strategy.barrier()  # once one rank ends srun ends the others, and scontrol with them

    # --- what it saves

    def _save_newest(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        wait(trainer)  # before names are chosen that nothing has
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""  # there is no file of this step to link to
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if self._validated_step != trainer.global_step:  # they are of other weights
            stale = self._validation_metrics | set(re.findall(r"\{([^:}]+)", self.filename or "")) - candidates.keys()
            candidates |= dict.fromkeys(stale, torch.tensor(torch.nan))
        return candidates

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        last = self._named(self.CHECKPOINT_NAME_LAST)
        former = None
        if filepath == last:
            wait(trainer)
            former = trainer.strategy.broadcast(self._own_target(last))
            if isinstance(trainer.strategy.checkpoint_io, ShardedCheckpointIO):
                filepath = self._free_name(
                    trainer, self._named(f"{self.CHECKPOINT_NAME_LAST}-step={trainer.global_step}")
                )
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link" or filepath != last:  # before upstream removes the checkpoint that it points to
            self._link_checkpoint(trainer, filepath, last)
        if former is not None:
            self._remove_checkpoint(trainer, former)

    def _own_target(self, last: str) -> str | None:
        """Where `last.ckpt` points to, if that is nothing but the newest checkpoint."""
        target = os.path.join(os.path.dirname(last), os.readlink(last)) if os.path.islink(last) else ""
        return target if os.path.basename(target).startswith(f"{self.CHECKPOINT_NAME_LAST}-") else None

    def _named(self, name: str) -> str:
        return os.path.join(str(self.dirpath), name + self.FILE_EXTENSION)

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: Trainer, del_filepath: str | None = None
    ) -> str:
        path = super()._get_metric_interpolated_filepath_name(monitor_candidates, trainer, del_filepath)
        is_sharded = isinstance(trainer.strategy.checkpoint_io, ShardedCheckpointIO)
        return self._free_name(trainer, path) if is_sharded else path

    def _free_name(self, trainer: Trainer, path: str) -> str:
        """The path, or one like it, where there is no checkpoint yet."""
        free, version = path, self.STARTING_VERSION
        while self.file_exists(free, trainer):
            free = f"{path.removesuffix(self.FILE_EXTENSION)}-v{version}{self.FILE_EXTENSION}"
            version += 1
        return free

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and filepath != linkpath:
            once_saved(trainer, partial(link, Path(filepath), Path(linkpath)))
        trainer.strategy.barrier()

    def _link_newest(self, trainer: Trainer) -> None:
        """Do what a kill prevented between a checkpoint and the link to it: a complete run saves no other one."""
        if trainer.ckpt_path is None:
            return
        resumed, last = Path(trainer.ckpt_path), Path(self._named(self.CHECKPOINT_NAME_LAST))
        if resumed.absolute().parent == last.absolute().parent and (
            not is_checkpoint(last) or TrainingCheckpoint(last).steps < TrainingCheckpoint(resumed).steps
        ):
            link(resumed, last)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        once_saved(trainer, partial(super()._remove_checkpoint, trainer, filepath))

    # --- whether it can

    def _check_files(self, trainer: Trainer) -> None:
        for other in trainer.checkpoint_callbacks:
            if (
                other is not self
                and isinstance(other, ModelCheckpoint)
                and other.filename == self.filename
                and os.path.realpath(str(other.dirpath)) == os.path.realpath(str(self.dirpath))
            ):
                raise ValueError(
                    f"two checkpoint callbacks would write the same files to {self.dirpath} and remove each other's:"
                    " give one of them a `filename` or a `dirpath` of its own"
                )

    # --- going on

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Paths are those of the run's directory as it is now called."""
        old, new = state_dict["dirpath"], str(self.dirpath)

        def here(path: str) -> str:
            return os.path.join(new, os.path.relpath(path, old)) if path and old != new else path

        moved = {name: here(path) for name, path in state_dict.items() if name.endswith("_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"dirpath": self.dirpath, "best_k_models": best})
        self._goes_on = True


def link(path: Path, name: Path) -> None:
    """Let a name stand for a checkpoint beside it, from one moment to the next."""
    with replacing(name, one_writer=True) as new:
        new.symlink_to(os.path.relpath(path, new.parent))


def once_saved(trainer: Trainer, action: Callable[[], None]) -> None:
    """Do something on this rank once the checkpoint that was saved last has its name."""
    checkpoint_io = trainer.strategy.checkpoint_io
    if isinstance(checkpoint_io, ShardedCheckpointIO):
        checkpoint_io.then(action)
    else:
        action()


def wait(trainer: Trainer) -> None:
    """Until the checkpoint that was saved last has its name. Raises ValueError where it could not be written."""
    if isinstance(trainer.strategy.checkpoint_io, ShardedCheckpointIO):
        trainer.strategy.checkpoint_io.wait()


def take_back_batches(trainer: Any) -> None:
    """Count no batch of the step under way, which is not taken: a resumed run draws all of them again."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    unused = progress.current.processed % trainer.accumulate_grad_batches
    for count in (progress.current, progress.total):
        count.processed -= unused
        count.ready = count.started = count.completed = count.processed


def warn_of_little_room(folder: Path, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Warn where there is no room for two checkpoints: one is written whole before the one before it goes."""
    size = sum(value.nbytes for value in tree_leaves(dict(checkpoint)) if isinstance(value, Tensor))
    states = checkpoint.get("optimizer_states", ())
    if states and not any(state["state"] for state in states):  # AdamW's, before its first step
        size += 2 * sum(p.nbytes for p in module.parameters() if p.requires_grad)
    free, more = free_bytes(folder), 1 if checkpoints_in(folder) else 2
    if free < more * size:
        log.warning(
            "a checkpoint will take up to %.1f GiB, there are two while one is written, and %.1f GiB are free in %s",
            *(size / 2**30, free / 2**30, folder),
        )
