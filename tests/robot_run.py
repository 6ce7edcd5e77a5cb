"""A run of the debug model that learns to act from one robot's dataset, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pi05_lightning.cli.main import main

STEPS = 2


def robot_source(dataset: Path, **options: Any) -> dict[str, Any]:
    kind = "pi05_lightning.data.sources.lerobot.LeRobotConfig"
    return {"class_path": kind, "init_args": {"path": str(dataset), "val_fraction": 0, **options}}


def write_config(folder: Path, dataset: Path, **options: Any) -> Path:
    """The run's configuration, in `folder`.  options: of the source."""
    content = {
        "model": {"config": "debug"},
        "data": {"sources": {"robot": robot_source(dataset, **options)}, "batch_size": 3, "num_workers": 0},
        "stages": {"pretrain_steps": 0, "posttrain_steps": STEPS, "posttrain": {"losses": {"flow": 1, "subtask": 0}}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def trained_run(folder: Path, dataset: Path, **options: Any) -> Path:
    """The directory of a run that `pi05 fit` brought to its end, in `folder`.  options: of the source."""
    run = folder / "run"
    main(["fit", "-c", str(write_config(folder, dataset, **options)), "--run", str(run)])
    return run
