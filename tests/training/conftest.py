"""The debug model on a small recorded dataset, through both stages."""

from __future__ import annotations

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


@pytest.fixture
def robot(videos: Path) -> LeRobotConfig:
    return LeRobotConfig(path=str(videos), val_fraction=0.2)


@pytest.fixture
def train(robot: LeRobotConfig, tmp_path: Path) -> Callable[..., Trainer]:
    """Run both stages, or what `options` of the Trainer leave of them; a checkpoint after every step."""

    def run(
        *callbacks: Callback,
        ckpt_path: Path | None = None,
        stages: dict[str, Any] | None = None,
        module_options: dict[str, Any] | None = None,
        data_options: dict[str, Any] | None = None,
        **options: Any,
    ):
        seed_everything(0)
        switch = StageSwitch(PRETRAIN_STEPS, POSTTRAIN_STEPS, **(stages or STAGES))
        adamw = partial(torch.optim.AdamW, lr=1e-3)
        given: dict[str, Any] = {"config": ModelConfig.preset("debug"), "optimizer": adamw, "flow_draws": 2}
        module = Pi05Module(**(given | (module_options or {})))
        data = Pi05DataModule({"robot": robot}, **({"batch_size": 4, "num_workers": 0} | (data_options or {})))
        each_step = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_exception=True)
        trainer = quiet_trainer(switch, each_step, *callbacks, default_root_dir=tmp_path, **options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return run
