"""What is checked on the first rank alone."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer


def on_first_rank(trainer: Trainer, check: Callable[[], None]) -> None:
    """Check something on the first rank. What it raises there ends all ranks: none waits for the others' gradients."""
    failed: Exception | None = None
    if trainer.is_global_zero:
        try:
            check()
        except Exception as error:
            failed = error
    message = trainer.strategy.broadcast(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if message is not None:
        raise ValueError(message)
