"""What `pi05 validate` and `pi05 test` measured: into the run, and printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from rich.console import Console

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.evaluation.report.metrics import write_metrics
from pi05_lightning.evaluation.report.tables import metrics_tables, questions_table
from pi05_lightning.files.local import write_json
from pi05_lightning.module import Pi05Module
from pi05_lightning.training.callbacks.predictions import measured_weights


class Measuring(NamedTuple):
    """What is particular to a command that measures."""

    part: str
    """Of the data."""
    prefix: str
    """Of the files in a run."""
    limit: str
    """The trainer's option that says how much of the data is measured."""
    mend: str
    """What gives a source samples of the part."""


MEASURING = {
    "validate": Measuring("validation", "", "limit_val_batches", "its val_fraction, or the dataset's splits"),
    "test": Measuring("test", "test_", "limit_test_batches", "the dataset's splits"),
}
"""By command."""


def show_results(trainer: Trainer, module: Pi05Module, run: Path, command: str) -> None:
    """Write what `validate` or `test` measured into a run, and of which weights, and print it.

    ValueError where nothing was measured: what is there stays.
    """
    part, prefix, limit, mend = MEASURING[command]
    if not module.results:
        raise ValueError(
            f"there is nothing to measure: set --trainer.{limit} 1.0 if it is 0, or give a source {part} samples"
            f" ({mend})"
        )
    tables = metrics_tables(write_metrics(module.results, run, f"{prefix}metrics"), part)
    write_json(run / f"{prefix}questions.json", module.questions)
    write_json(
        run / f"{prefix}measured.json", measured_weights(trainer, module) | measured_with(trainer, module, limit)
    )
    Console().print(*tables, *(questions_table(subset, rows) for subset, rows in module.questions.items()))


def measured_with(trainer: Trainer, module: Pi05Module, limit: str) -> dict[str, Any]:
    """What results depend on beside the weights: options by their keys in a configuration, and paths by source.

    limit: the trainer's option that says how much of the data is measured.
    """
    data = datamodule_of(trainer)
    options = {
        "model.accuracy_threshold": module.accuracy_threshold,
        "model.num_steps": module.num_steps,
        "data.val_samples": data.val_samples,
        f"trainer.{limit}": getattr(trainer, limit),
    }
    paths = {name: getattr(config, "path", None) for name, config in data.configs.items()}
    return {"options": options, "paths": {name: str(path) for name, path in paths.items() if path is not None}}
