"""One clock, the optimizer step. Lightning counts batches and epochs; both are told from the step here.

Draws, stages, schedules and checkpoints go by the step. How many batches a step accumulates, and where epochs end
(`trainer.limit_train_batches`), may change when a run is resumed: its step stays what it was.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

DEFAULT_EPOCHS = 1000
"""The epochs of a trainer that was told neither `max_epochs` nor `max_steps`."""


def accumulated(trainer: Trainer, epoch: int) -> int:
    """Batches of a step in an epoch."""
    scheduler = _scheduler(trainer)
    return trainer.accumulate_grad_batches if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)


def most_batches(trainer: Trainer) -> int:
    """Batches of a whole run, at most."""
    return trainer.max_steps * max(_possible(trainer))


def check_clock(trainer: Trainer) -> None:
    """Raises ValueError for options by which an epoch would end within a step, or batches be none of the mixture's."""
    options, scheduler = _options(trainer), _scheduler(trainer)
    if trainer.min_steps is not None and 0 <= trainer.max_steps < trainer.min_steps:
        raise ValueError(
            f"trainer.min_steps is {trainer.min_steps}, and the run ends after {trainer.max_steps} steps: raise the"
            " stages' steps, and trainer.max_steps if it is set, or leave min_steps out"
        )
    if options.overfit_batches:
        raise ValueError(
            "trainer.overfit_batches repeats the first batches of a data set, and stages draw from a mixture: to train"
            " on little data, name few `episodes` in data.sources"
        )
    limit = options.limit_train_batches
    if isinstance(limit, float) and 0 < limit < 1:
        raise ValueError(
            f"trainer.limit_train_batches is {limit}, a share, and the training data have no end: give the batches of"
            " an epoch as a whole number, and a shorter run as trainer.max_steps"
        )
    given = {
        "max_epochs": trainer.max_epochs not in (None, -1, DEFAULT_EPOCHS),
        "min_epochs": (trainer.min_epochs or 0) > 1,
    }
    if not isinstance(limit, int) and (idle := [key for key, is_given in given.items() if is_given]):
        raise ValueError(
            f"trainer.{idle[0]} is {getattr(trainer, idle[0])}, and without trainer.limit_train_batches the run is"
            " one epoch, so it would do nothing: give the stages' steps or trainer.max_steps, or set"
            " limit_train_batches to the batches of an epoch"
        )
    if scheduler is not None and isinstance(limit, float) and len(_possible(trainer)) > 1:
        raise ValueError(
            "GradientAccumulationScheduler changes the accumulation with the epoch, and without"
            " trainer.limit_train_batches the run is one epoch: set it to the batches of an epoch"
        )
    length = _epoch(trainer)
    interval = options.val_check_interval
    if isinstance(interval, int) and interval > length and options.check_val_every_n_epoch is not None:
        raise ValueError(
            f"trainer.val_check_interval is {interval}, and the run has {length} batches, so it would never validate:"
            " give fewer, or set trainer.limit_val_batches to 0 for no validation and val_check_interval to null"
        )
    every, epochs = options.check_val_every_n_epoch, -(-most_batches(trainer) // max(length, 1))
    if every is not None and every > epochs and options.limit_val_batches:
        raise ValueError(
            f"trainer.check_val_every_n_epoch is {every}, and the run has {epochs} epochs, so it would never validate:"
            " set it to null and trainer.val_check_interval to batches, or trainer.limit_val_batches to 0 for no"
            " validation"
        )
    for batches in _possible(trainer):
        if length % batches:
            key = "fast_dev_run" if options.fast_dev_run else "limit_train_batches"
            least = -(-length // batches) * batches
            raise ValueError(
                f"trainer.{key}: an epoch of {length} batches ends within a step, which accumulates {batches}"
                f" (trainer.accumulate_grad_batches): set it to a multiple, such as {least}"
            )


def start(trainer: Trainer) -> tuple[int, int]:
    """The step that an epoch goes on with, and the batches of its steps."""
    # Lightning's scheduler leaves it out where a run goes on within an epoch
    trainer.accumulate_grad_batches = accumulated(trainer, trainer.current_epoch)
    return trainer.global_step, trainer.accumulate_grad_batches


def align(trainer: Trainer) -> None:
    """Set the counters of a resumed run to where they would be had its accumulation and epochs always been as now.

    Where they are there already, everything stays as it was saved.
    """
    fit, loop, step = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.global_step
    if not fit.restarting or not 0 < step < trainer.max_steps:
        return
    length, (epoch, batches) = _epoch(trainer), _position(trainer, step)
    progress: Any = loop.batch_progress  # its trackers have more fields than are declared
    done = progress.current.processed
    if _scheduler(trainer) is None:  # which epoch it is decides on nothing
        aligned = done == batches or (not batches and done == length)
    else:
        at_end = not batches and (trainer.current_epoch, done) == (epoch - 1, length)
        aligned = ((trainer.current_epoch, done) == (epoch, batches) or at_end) and progress.is_last_batch == at_end
    if aligned:
        return
    for tracker, count in ((progress.current, batches), (progress.total, epoch * length + batches)):
        tracker.ready = tracker.started = tracker.processed = tracker.completed = count
    progress.is_last_batch = False
    epochs: Any = fit.epoch_progress
    for tracker in (epochs.current, epochs.total):
        tracker.ready = tracker.started = epoch + bool(batches)
        tracker.processed = tracker.completed = epoch
    loop._batches_that_stepped = step


def _position(trainer: Trainer, step: int) -> tuple[int, int]:
    """The epoch in which so many steps end, and how many of its batches they have taken."""
    epoch, length = 0, _epoch(trainer)
    while step * (batches := accumulated(trainer, epoch)) >= length:
        step -= length // batches
        epoch += 1
    return epoch, step * batches


def _epoch(trainer: Trainer) -> int:
    """Batches of an epoch: the whole run's, where nothing limits them."""
    limit, most = _options(trainer).limit_train_batches, most_batches(trainer)
    return min(limit, most) if isinstance(limit, int) else most


def _possible(trainer: Trainer) -> set[int]:
    """All numbers of batches that a step may accumulate."""
    scheduler = _scheduler(trainer)
    return {trainer.accumulate_grad_batches} if scheduler is None else set(scheduler.scheduling.values())


def _scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    found = [c for c in _options(trainer).callbacks if isinstance(c, GradientAccumulationScheduler)]
    return found[-1] if found else None


def _options(trainer: Trainer) -> Any:
    """The trainer, which does not declare all of its options."""
    return trainer
