"""Signals act between two steps, so that what is saved then is the state after a whole step."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pi05_lightning.module.trainer import callbacks_of

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A signal ends the run between two steps. Its status is 128 and the signal's number, as of a killed process."""

    def __init__(self, signum: int, requeued: bool) -> None:
        super().__init__(128 + signum)
        self.requeued = requeued
        """Once it is saved, the job goes back to SLURM's queue."""


class InterruptBetweenSteps(Callback):
    """Holds Ctrl-C, SIGTERM and SLURM's signal back until the step under way has ended; a second Ctrl-C acts at once.

    Then the run is saved and ends with status 128 and the signal's number. Under SLURM its signal (SIGUSR1, as in
    `#SBATCH --signal=USR1@90`) also requeues the job, unless `auto_requeue` is off.
    Inside an optimizer step an end would leave half of the parameters updated, and between accumulated batches it would
    lose gradients. A validation is broken off, and made up when the run goes on (`Restart`). Several ranks agree on the
    step, whichever of them the signal reached; there validation is not broken off, since they do not validate equally
    many batches. What comes while the run starts acts before its first step; Ctrl-C at once, and SIGTERM while nothing
    but data and weights are read. The commands other than `fit` have nothing to save, and end at once with the same
    status.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.requeue: int | None = None
        self._hosts: dist.ProcessGroup | None = None
        """The ranks' processors: to agree through them does not wait for what their devices still compute."""
        self._before: Any = signal.SIG_DFL
        """What handled SLURM's signal before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.requeue = requeue_signal(trainer) if stage == "fit" else None
        if self.requeue is not None:  # before the trainer, whose own handler would save elsewhere and train on
            self._before = signal.signal(self.requeue, self._request)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.requeue is not None:
            signal.signal(self.requeue, self._before)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not earlier: the trainer then sets handlers of its own. It puts back those from before when it ends
        if is_main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._request)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_sanity_check_start(trainer, pl_module)
        if trainer.received_sigterm:  # by the trainer's handler, with which the run would end in a step, and with 0
            self.requested = signal.SIGTERM
        if trainer.world_size > 1:
            self._hosts = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))
        self._stop_together(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" and is_main_thread():  # the trainer's handler would end a part of them, with 0
            signal.signal(signal.SIGTERM, end)

    on_test_start = on_predict_start = on_validation_start

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = signum
        hint = ""
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
            hint = " Once more to stop at once."
        rank_zero_info(f"\n{signal.Signals(signum).name}: saving after this step.{hint}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not within_step(trainer):
            self._stop_together(trainer)

    def _stop_together(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:  # the highest that any rank was sent
            highest = torch.tensor(self.requested)
            dist.all_reduce(highest, dist.ReduceOp.MAX, self._hosts)
            self.requested = int(highest)
        self._stop()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.world_size == 1 and not within_step(trainer):
            self._stop()

    def _stop(self) -> None:
        if self.requested:
            signum, self.requested = self.requested, 0
            raise Stopped(signum, requeued=signum == self.requeue)


def stop_if_asked(trainer: Trainer) -> None:
    """Between two steps, for what takes long there: raises `Stopped` if a signal has come. Several ranks go on."""
    for callback in callbacks_of(trainer, InterruptBetweenSteps):
        callback.on_validation_batch_end(trainer)


def end(signum: int, frame: FrameType | None) -> None:
    """Of a signal: the process ends with its status."""
    raise SystemExit(128 + signum)


def is_main_thread() -> bool:
    """Whether signals can be handled here: Python lets no other thread do so."""
    return threading.current_thread() is threading.main_thread()


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM asks a job to save and to queue again; None elsewhere."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None and SLURMEnvironment.detect():  # of one process
        environment = SLURMEnvironment()
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return (environment.requeue_signal or signal.SIGUSR1) if is_main_thread() else None


def within_step(trainer: Any) -> bool:
    """Whether gradients have been accumulated that no optimizer step has used."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed % trainer.accumulate_grad_batches != 0


def within_batch(trainer: Any) -> bool:
    """Whether a training batch is being computed, whose step may be half done."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.ready != progress.processed


def requeue() -> None:
    """Give this SLURM job back to the queue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    command = shutil.which("scontrol")
    if command is None:
        log.error("job %s is not requeued: there is no scontrol here", job)
    elif subprocess.run([command, "requeue", job]).returncode:
        log.error("job %s is not requeued: scontrol refused to", job)
    else:
        log.info("job %s is requeued", job)
