"""Two ranks, of which the second has a loss that is not finite in step 3: `python sick_ranks.py DATASET FOLDER`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint


class SickRank(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            batch.actions[:] = float("nan")


def main(dataset: str, folder: str) -> None:
    seed_everything(0)
    stage = StageOptions(LossWeights(flow=1), {"robot/continuous_robot_actions": 1})
    save = RunCheckpoint(folder, "{step}", every_n_train_steps=100, save_last="link", save_on_exception=True)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        devices=2,
        strategy="ddp",
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSwitch(0, 6, posttrain=stage), save, SickRank()],
    )
    module = Pi05Module(ModelConfig.preset("debug"), partial(torch.optim.AdamW, lr=1e-3))
    source = LeRobotConfig(path=dataset, val_fraction=0.2)
    trainer.fit(module, Pi05DataModule({"robot": source}, batch_size=2, num_workers=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
