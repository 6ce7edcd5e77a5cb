"""Runs on two ranks over gloo, as a process of its own: `python two_ranks.py DATASET FOLDER [freeze pattern]`."""

from __future__ import annotations

import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, Stage, StageOptions
from pi05_lightning.training.callbacks import stages
from pi05_lightning.training.callbacks.ema import WeightAverage


class Rounding(torch.optim.AdamW):
    """Draws in every step from torch's own generator, as torchao's optimizers do that round to bf16 at random."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.data += 1e-5 * torch.rand_like(parameter)
        return loss


class Steps(Callback):
    """Losses and gradients of every step, whether DDP searches, what it waits for, and how many DDPs there were."""

    def __init__(self) -> None:
        self.losses: list[Any] = []
        self.gradients: list[Any] = []
        self.searches: list[bool] = []
        self.alive: list[int] = []
        self.waits_for: list[int] = []
        self.wrapped = weakref.WeakSet[Any]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ddp: Any = trainer.strategy.model
        self.wrapped.add(ddp)
        self.alive.append(len(self.wrapped))
        self.searches.append(ddp.find_unused_parameters)
        self.waits_for.append(sum(p.requires_grad for p in ddp.parameters()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in found if p.grad is not None})

    def on_train_batch_end(self, *args: Any) -> None:
        outputs: STEP_OUTPUT = args[2]
        self.losses.append(outputs["loss"].detach())  # type: ignore[index]

    def state(self) -> dict[str, Any]:
        names = ("losses", "gradients", "searches", "waits_for", "alive")
        return {name: getattr(self, name) for name in names}


def fit(dataset: str, folder: str, freeze: tuple[str, ...], strategy: DDPStrategy) -> dict[str, Any]:
    """Train 2 + 2 + 2 steps: a rank's weights, average, and what `Steps` saw."""
    seed_everything(0)
    pretrain = StageOptions(LossWeights(text=1, subtask=1), {"robot/qa": 0.5, "robot/hl_subtask": 0.5}, freeze=freeze)
    posttrain = StageOptions(
        LossWeights(subtask=1, flow=1), {"robot/hl_subtask": 0.5, "robot/continuous_robot_actions": 0.5}
    )
    acting = Stage(name="acting", steps=2, losses=LossWeights(flow=1), mixture={"robot/continuous_robot_actions": 1})
    average, steps = WeightAverage(0.9), Steps()
    module = Pi05Module(ModelConfig.preset("debug"), partial(Rounding, lr=1e-3))
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        devices=2,
        strategy=strategy,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSwitch(2, 2, pretrain=pretrain, posttrain=posttrain, then=[acting]), average, steps],
    )
    source = LeRobotConfig(path=dataset, val_fraction=0.2)
    trainer.fit(module, Pi05DataModule({"robot": source}, batch_size=2, num_workers=0))
    found = {"weights": module.model.state_dict(), "average": average.average, "step": trainer.global_step}
    return found | steps.state() | {"rank": trainer.global_rank}


def main(dataset: str, folder: str, *freeze: str) -> None:
    """Leave what each rank ended with in `FOLDER/RANK.pt`; `searching` with one DDP that looks at every batch."""
    found = fit(dataset, folder, freeze, DDPStrategy())
    stages.wrap = lambda *args: None
    found["searching"] = fit(dataset, folder, freeze, DDPStrategy(find_unused_parameters=True))
    torch.save(found, Path(folder, f"{found['rank']}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
