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
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS, STAGES
from tests.quiet_trainer import quiet_trainer

# the processes of a sharded run import what is there too, see tests/sharding/conftest.py
sys.path.append(str(Path(__file__).parents[1] / "sharding"))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: what deterministic products need


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
        switch = StageSwitch(PRETRAIN_STEPS, POSTTRAIN_STEPS, **STAGES)
        device = {"accelerator": accelerator, "devices": 1, "gradient_clip_val": 1.0}
        trainer = quiet_trainer(switch, *callbacks, default_root_dir=tmp_path, **device, **options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def each_step(tmp_path: Path) -> ModelCheckpoint:
    """A checkpoint after every step, `step=N.ckpt` in tmp_path."""
    return ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
