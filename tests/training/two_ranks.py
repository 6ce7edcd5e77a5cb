"""A run on two ranks over gloo, as a process of its own: `python two_ranks.py DATASET FOLDER [freeze pattern]`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.ema import WeightAverage


def main(dataset: str, folder: str, *freeze: str) -> None:
    """Train 2 + 2 steps and leave each rank's weights, average and last gradients in `FOLDER/RANK.pt`."""
    seed_everything(0)
    pretrain = StageOptions(LossWeights(text=1, subtask=1), {"robot/qa": 0.5, "robot/hl_subtask": 0.5}, freeze=freeze)
    posttrain = StageOptions(
        LossWeights(subtask=1, flow=1), {"robot/hl_subtask": 0.5, "robot/continuous_robot_actions": 0.5}
    )
    average = WeightAverage(0.9)
    module = Pi05Module(ModelConfig.preset("debug"), partial(torch.optim.AdamW, lr=1e-3))
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        devices=2,
        strategy="ddp",
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSwitch(2, 2, pretrain=pretrain, posttrain=posttrain), average],
    )
    source = LeRobotConfig(path=dataset, val_fraction=0.2)
    trainer.fit(module, Pi05DataModule({"robot": source}, batch_size=2, num_workers=0))
    found = {"weights": module.model.state_dict(), "average": average.average, "step": trainer.global_step}
    torch.save(found, Path(folder, f"{trainer.global_rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
