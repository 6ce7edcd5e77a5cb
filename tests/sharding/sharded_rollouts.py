"""A run that rolls its policy out now and then, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from sharded_runs import Notes, weights_of

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.rollout import PeriodicRollout

FLOW = StageOptions(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0})


class Remembered(PeriodicRollout):
    """Keeps the weights that acted."""

    def run(self, policy: Inference, *between: Any) -> Any:
        self.acted = {name: value.clone() for name, value in policy.model.state_dict().items()}
        return super().run(policy, *between)


def roll_out(collected: str, folder: str, ranks: int) -> dict[str, Any]:
    """Train three steps, with a rollout after the second: the weights that acted in it, on the first rank, and those
    that were trained, and are saved."""
    seed_everything(0)
    rollout = Remembered(every_n_steps=2, tasks=["reach-v3"], episodes=1, max_seconds=0.3)
    notes = Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="fsdp2" if ranks > 1 else "auto",
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=notes,
        default_root_dir=folder,
        callbacks=[
            StageSwitch(0, 3, posttrain=FLOW),
            WeightAverage(0.9),
            rollout,
            RunCheckpoint(every_n_train_steps=3),
        ],
    )
    module = Pi05Module(ModelConfig.preset("debug"), lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-5))
    source = LeRobotConfig(str(Path(collected) / "robot"))
    trainer.fit(module, Pi05DataModule({"robot": source}, batch_size=4 // ranks, num_workers=0, length_window=1))
    films = sorted(film.name for film in Path(folder).glob("rollouts/*.mp4"))
    acted = rollout.acted if trainer.is_global_zero else {}
    return {"weights": weights_of(module), "acted": acted, "films": films}
