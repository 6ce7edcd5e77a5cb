"""What `pi05 predict` leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file

from pi05_lightning.data.datamodule import datamodule_of


class PredictionsFile(BasePredictionWriter):
    """Writes `predictions.safetensors` into the run: `source/modality` -> normalised action chunks f32[N T D].

    Each rank writes what it predicted; further ranks' files carry their number.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        names = list(map(str, datamodule_of(trainer).evaluated_subsets))
        by_loader = predictions if len(names) > 1 else [predictions]
        chunks = {
            name: torch.cat(list(batches)).contiguous()
            for name, batches in zip(names, by_loader, strict=True)
            if sum(len(batch) for batch in batches)
        }
        rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
        file = Path(trainer.default_root_dir, f"predictions{rank}.safetensors")
        save_file(chunks, file)
        rank_zero_info(f"{sum(map(len, chunks.values()))} action chunks written to {file}")
