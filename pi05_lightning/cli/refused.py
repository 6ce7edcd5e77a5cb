"""Options of a run that Lightning takes without a word, and for which it does nothing, or something else."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Timer

from pi05_lightning.files.ranges import check_range


def check_trainer(trainer: Namespace, command: str) -> None:
    """ValueError for numbers that Lightning takes without a word, and for which it does nothing, or something else."""
    least = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0, "log_every_n_steps": 0}
    least |= {"num_sanity_val_steps": -1, "min_steps": 0, "min_epochs": 0}
    for key, bound in least.items():
        check_range(f"trainer.{key}", trainer[key], bound)
    if isinstance(trainer.val_check_interval, int | float):
        check_range("trainer.val_check_interval", trainer.val_check_interval, 0, above=True)
    elif trainer.val_check_interval is not None:
        raise ValueError(
            f"trainer.val_check_interval is a time, {trainer.val_check_interval}: give it in batches, as several ranks"
            " would not validate together by their clocks"
        )
    if trainer.default_root_dir is not None:
        raise ValueError("trainer.default_root_dir is not where a run lies: give its directory as --run")
    if trainer.barebones:
        raise ValueError("trainer.barebones leaves out the logs and checkpoints that make a run: leave it out")
    if command == "fit":
        if trainer.max_time is not None and Timer(trainer.max_time).time_remaining() == 0:
            raise ValueError("trainer.max_time is no time, so nothing would be trained: leave it out, or give more")
        for key in ("max_steps", "max_epochs", "limit_train_batches"):
            if trainer[key] == 0:
                raise ValueError(f"trainer.{key} is 0, so nothing would be trained: leave it out, or give a number")


def check_saved(checkpoint: Namespace, trainer: Namespace) -> None:
    """ValueError where nothing would be saved before the end of the run."""
    steps, epochs = checkpoint.every_n_train_steps, checkpoint.every_n_epochs
    if steps or checkpoint.train_time_interval:
        return
    # upstream saves each epoch where nothing is given. The whole run is one, whose validations save too
    several = isinstance(trainer.limit_train_batches, int) or trainer.val_check_interval not in (None, 1.0)
    if not several or not (epochs or (steps is None and epochs is None)):
        raise ValueError(
            f"checkpoint.every_n_train_steps is {'null' if steps is None else steps}, so a run that is killed would be"
            " lost: give a number, or checkpoint.train_time_interval beside 0"
        )


def check_loggers(loggers: Any) -> None:
    """ValueError for a number by which a logger divides."""
    for logger in as_list(loggers):
        given = logger.get("init_args") if isinstance(logger, Namespace) else None  # some classes have none
        every = given.get("flush_logs_every_n_steps") if given else None
        check_range("trainer.logger.init_args.flush_logs_every_n_steps", every, 1)


def as_list(value: Any) -> list[Any]:
    """What Lightning takes as one, as several or as None."""
    return value if isinstance(value, list) else [] if value is None else [value]
