"""A training run of the debug model on a device, through both stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions

# the processes of a sharded run import what is there too, see tests/sharding/conftest.py
sys.path.append(str(Path(__file__).parents[1] / "sharding"))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: what deterministic products need

PRETRAIN_STEPS, POSTTRAIN_STEPS = 3, 3
STAGES = {
    "pretrain": StageOptions(LossWeights(text=1, subtask=1), {"robot/qa": 0.5, "robot/hl_subtask": 0.5}),
    "posttrain": StageOptions(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0}),
}


@pytest.fixture
def fit(videos: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Both stages on an accelerator, or what `options` of the Trainer leave of them."""

    def run(
        accelerator: str,
        *callbacks: Callback,
        ckpt_path: Path | None = None,
        module_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Trainer:
        seed_everything(0)
        module = Pi05Module(
            ModelConfig.preset("debug"),
            optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True),
            flow_draws=2,
            **(module_options or {}),
        )
        data = Pi05DataModule({"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}, batch_size=4, num_workers=0)
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            default_root_dir=tmp_path,
            max_epochs=-1,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=[StageSwitch(PRETRAIN_STEPS, POSTTRAIN_STEPS, **STAGES), *callbacks],
            **options,
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def each_step(tmp_path: Path) -> ModelCheckpoint:
    """A checkpoint after every step, `step=N.ckpt` in tmp_path."""
    return ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
