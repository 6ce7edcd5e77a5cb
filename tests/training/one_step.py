"""Two steps of a run with every loss term, split as is said: `python one_step.py DATASET FAST FOLDER RANKS N`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import Head
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.types import Batch, Modality, Prefix

SAMPLES = 24
STEPS = 2


class Notes(DummyLogger, Callback):
    """What was logged of each step's losses, and the gradients of all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss/total" in metrics:
            self.losses.append({name: value for name, value in metrics.items() if name.startswith("loss/")})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class QuietHead(Head):
    """Keeps the hidden states of valid tokens small; padding is left out by its mask."""

    terms: ClassVar = {"quiet": frozenset(Modality)}
    reads_hidden = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        return {"quiet": batch.token_mask}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        assert prefix.hidden is not None
        return {"quiet": prefix.hidden.square().mean(-1)}


class AbsentHead(Head):
    """Has nothing to learn from, ever."""

    terms: ClassVar = {"absent": frozenset(Modality)}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        raise AssertionError("a batch without targets has no loss")


def main(dataset: str, fast: str, folder: Path | str, ranks: int, accumulate: int) -> dict[str, Any]:
    """Train two steps of SAMPLES samples, without an update, and leave what each rank noted in `FOLDER/RANK.pt`."""
    seed_everything(0)
    losses = LossWeights(text=1, subtask=1, fast=1, location=1, flow=1, others={"quiet": 1, "absent": 1})
    names = ("qa", "hl_subtask", "fast_robot_actions", "continuous_robot_actions")
    everything = StageOptions(losses, {f"robot/{name}": 0.25 for name in names})
    module = Pi05Module(
        ModelConfig.preset("tiny"),
        partial(torch.optim.SGD, lr=0.0),
        heads={"quiet": QuietHead, "absent": AbsentHead},
        rtc_max_delay=3,
    )
    notes = Notes()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=notes,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSwitch(0, STEPS, posttrain=everything), notes],
    )
    source = LeRobotConfig(path=dataset, val_fraction=0.2)
    data = Pi05DataModule(
        {"robot": source}, batch_size=SAMPLES // ranks // accumulate, fast=fast, num_workers=0, length_window=1
    )
    trainer.fit(module, data)
    found = {"losses": notes.losses, "gradients": notes.gradients}
    torch.save(found, Path(folder, f"{trainer.global_rank}.pt"))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))  # type: ignore[arg-type]
