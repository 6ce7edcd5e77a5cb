"""What a sharded run refuses or leaves out, on all of its ranks though one alone has it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sharded_runs import FSDP2, train
from torch import Tensor

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import Head
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks import checkpoint, forecast
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.training.callbacks.forecast import MemoryForecast
from pi05_lightning.types import Batch, Modality, Prefix
from pi05_lightning.weights.sharded_checkpoint import read

ACTIONS = frozenset({Modality.CONTINUOUS})
SICK = 2


class SickRank(Callback):
    """The second rank has actions that are no numbers in one step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == SICK and trainer.global_rank == 1:
            batch.actions[:] = torch.nan


class OfValues(Head):
    """Looks at values, of which there are none on the meta device."""

    terms: ClassVar = {"own": ACTIONS}
    expected = 0.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.scale)

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        return {"own": torch.ones_like(batch.actions[:, 0, 0], dtype=torch.bool)}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        if len(batch.actions) and float(batch.actions.abs().max()) < self.expected:
            raise ValueError("actions are too small")
        return {"own": self.scale.sum() * batch.actions[:, 0, 0].square()}


class OfLargeValues(OfValues):
    expected = 1e9


def stage(**others: float) -> dict[str, StageOptions]:
    return {"posttrain": StageOptions(LossWeights(flow=1, others=others), {"robot/continuous_robot_actions": 1.0})}


def message(*args: Any, **options: Any) -> str:
    try:
        train(*args, **{"steps": (0, 4), "stages": stage()} | options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def apart(dataset: str, folder: str) -> dict[str, Any]:
    """The forecast, and what is refused, where the second rank has less memory and a disk of its own."""
    memory, is_second, shared = list[str](), os.environ["LOCAL_RANK"] == "1", checkpoint.check_shared
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: memory.append(record.getMessage()) or True)
    if is_second:
        forecast.free_memory = lambda device: 6 * 2**30
    checkpoint.check_shared = lambda path: shared(path / "second" if is_second else path, patience=1)
    callbacks = [MemoryForecast(), RunCheckpoint(dirpath=folder)]
    refused = message(dataset, None, 2, strategy="ddp", callbacks=callbacks, enable_checkpointing=True)
    return {"refused": refused, "memory": [line for line in memory if line.startswith("Memory")]}


def troubles(dataset: str, fast: str, folder: str) -> dict[str, Any]:
    start = dataset, fast, 2
    save = RunCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=100, save_on_exception=True)
    found: dict[str, Any] = {
        "replicas": message(*start, strategy=FSDP2(replicas=3)),
        "sick": message(*start, callbacks=[SickRank(), save], enable_checkpointing=True),
        "values": message(*start, module={"heads": {"own": OfValues}}, stages=stage(own=1.0)),
        "small values": message(*start, module={"heads": {"own": OfLargeValues}}, stages=stage(own=1.0)),
    }
    found["saved"] = read(Path(folder, f"step={SICK}.ckpt"))["global_step"]
    skipped = train(*start, steps=(0, 4), stages=stage(), callbacks=[SickRank()], module={"max_skipped_steps": 1})
    found["skipped"] = [bool(torch.stack([x.isfinite().all() for x in skipped["weights"].values()]).all())]
    return found
