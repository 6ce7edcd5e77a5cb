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
import torch.distributed
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

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
    many batches.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.requeue: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not earlier: the trainer then sets handlers of its own. It puts back those from before when it ends
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread handle signals
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is None and SLURMEnvironment.detect():  # of one process
            environment = SLURMEnvironment()
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue = environment.requeue_signal or signal.SIGUSR1
        for signum in (signal.SIGINT, signal.SIGTERM, *([self.requeue] if self.requeue else [])):
            signal.signal(signum, self._request)

    on_sanity_check_start = on_train_start

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = signum
        hint = ""
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
            hint = " Once more to stop at once."
        rank_zero_info(f"\n{signal.Signals(signum).name}: saving after this step.{hint}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if within_step(trainer):
            return
        if trainer.world_size > 1:  # the highest that any rank was sent
            highest = torch.tensor(self.requested, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            self.requested = int(highest)
        self._stop()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.world_size == 1 and not within_step(trainer):
            self._stop()

    def _stop(self) -> None:
        if self.requested:
            signum, self.requested = self.requested, 0
            raise Stopped(signum, requeued=signum == self.requeue)


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
        log.error("job %s is saved but not requeued: there is no scontrol here", job)
    elif subprocess.run([command, "requeue", job]).returncode:
        log.error("job %s is saved, but scontrol would not requeue it", job)
    else:
        log.info("job %s is saved and requeued", job)
