"""A Trainer that takes steps and does nothing else, unless a test asks for more."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint


def quiet_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """On the CPU, without logger, validation, and checkpoints that no callback writes; `options` come before these."""
    quiet = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **quiet | options)
