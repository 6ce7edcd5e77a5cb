"""The configuration of the runs that are killed, stopped and gone on with: the debug model through both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PRETRAIN_STEPS, POSTTRAIN_STEPS, ACCUMULATE = 3, 4, 2


def write_config(
    folder: Path,
    dataset: Path,
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    pretrain: dict[str, Any],
    callbacks: list[str],
) -> Path:
    """Micro-batches, averaged weights and a checkpoint after every step; and what is given of each part, besides."""
    robot = {
        "class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig",
        "init_args": {"path": str(dataset), "val_fraction": 0.2},
    }
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}}
    content = {
        "model": {"config": "debug", "optimizer": adamw, **model},
        "data": {"sources": {"robot": robot}, **data},
        "stages": {
            "pretrain_steps": PRETRAIN_STEPS,
            "posttrain_steps": POSTTRAIN_STEPS,
            "pretrain": {
                "losses": {"text": 1, "subtask": 1},
                "mixture": {"robot/qa": 0.5, "robot/hl_subtask": 0.5},
                **pretrain,
            },
            "posttrain": {
                "losses": {"subtask": 1, "flow": 1},
                "mixture": {"robot/continuous_robot_actions": 0.7, "robot/hl_subtask": 0.3},
            },
        },
        "ema": {"decay": 0.9},
        "checkpoint": {"every_n_train_steps": 1},
        "trainer": {
            "accelerator": "cpu",
            "accumulate_grad_batches": ACCUMULATE,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": name} for name in callbacks],
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
