"""What Lightning's Trainer has, and sets without declaring it."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, Trainer


def callbacks_of[T: Callback](trainer: Trainer, kind: type[T]) -> list[T]:
    """Its callbacks of a kind, in their order."""
    return [callback for callback in cast("Any", trainer).callbacks if isinstance(callback, kind)]


def logs_every(trainer: Trainer) -> int:
    """Optimizer steps between those of which numbers are logged; 0 logs none."""
    return int(cast("Any", trainer).log_every_n_steps)


def leaves_nothing(trainer: Trainer) -> bool:
    """Whether it only tries a few steps, of which no file is to tell."""
    return bool(cast("Any", trainer).fast_dev_run)
