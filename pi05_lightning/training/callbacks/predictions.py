"""What `pi05 predict` leaves behind: chunks beside what was recorded, in a table per source."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.data.samples import Observed
from pi05_lightning.files.local import write_json
from pi05_lightning.module import Pi05Module, Predicted
from pi05_lightning.training.callbacks.ema import validates_average
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

FOLDER = "predictions"
ABOUT = "predictions.json"


class PredictionsFile(Callback):
    """Writes the run's predictions/: a folder of parquet files per source, and predictions.json, which says of what.

    Every rank writes a file of its own (`rank-0.parquet`). The folder takes the place of an earlier one as a whole,
    once everything is predicted.
    """

    def __init__(self) -> None:
        self._writers: dict[str, pq.ParquetWriter] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            shutil.rmtree(_part(trainer), ignore_errors=True)
            _part(trainer).mkdir(parents=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Predicted,
        batch: Observed,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not batch.frames:
            return
        rows = table(batch, outputs)
        if batch.source not in self._writers:
            file = _part(trainer) / batch.source / f"rank-{trainer.global_rank}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writers[batch.source] = pq.ParquetWriter(file, rows.schema)
        self._writers[batch.source].write_table(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        self._close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            part, folder = _part(trainer), Path(trainer.default_root_dir, FOLDER)
            about = describe(trainer, pl_module, part)
            write_json(part / ABOUT, about)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            rank_zero_info(f"{sum(s['samples'] for s in about['sources'].values())} action chunks written to {folder}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()
        if trainer.predicting and trainer.is_global_zero:
            shutil.rmtree(_part(trainer), ignore_errors=True)

    def _close(self) -> None:
        while self._writers:
            self._writers.popitem()[1].close()


def _part(trainer: Trainer) -> Path:
    """Where predictions are until they are whole."""
    return Path(trainer.default_root_dir, f".{FOLDER}.part")


def table(observed: Observed, predicted: Predicted) -> pa.Table:
    """A row per frame: where it is, what it says, and both chunks as lists of steps, each a list of all dims.

    Steps of the model's horizon that the robot's chunks do not have are left out.
    """
    frames, chunk, texts = observed.frames, pa.list_(pa.list_(pa.float32())), pa.string()
    steps = slice(predicted.actions.shape[1])
    columns = {
        "source": pa.array([observed.source] * len(frames), texts),
        **{name: pa.array([place[name] for place in observed.places]) for name in observed.places[0]},
        "task": pa.array([frame.task for frame in frames], texts),
        "subtask": pa.array([frame.subtask for frame in frames], texts),
        "predicted_subtask": pa.array(predicted.subtasks, texts),
        "state": pa.array([_plain(frame.state) for frame in frames], pa.list_(pa.float32())),
        "predicted_action": pa.array(predicted.actions.tolist(), chunk),
        "action": pa.array([_plain(frame.actions, steps) for frame in frames], chunk),
        "action_is_pad": pa.array([_plain(frame.action_is_pad, steps) for frame in frames], pa.list_(pa.bool_())),
    }
    return pa.table(columns)


def _plain(values: np.ndarray | None, rows: slice = slice(None)) -> Any:
    return None if values is None else values[rows].tolist()


def describe(trainer: Trainer, module: Pi05Module, folder: Path) -> dict[str, Any]:
    """Which weights acted, how, and what the numbers of every source's table are."""
    data = datamodule_of(trainer)
    sources = {}
    for name, source in data.predicted_sources.items():
        robot = data.own_processor.robots[name]
        sources[name] = {
            "dataset": robot.dataset,
            "samples": sum(pq.read_metadata(file).num_rows for file in (folder / name).glob("*.parquet")),
            "fps": robot.fps,
            "action": source.names("action"),
            "state": source.names("state"),
        }
    return {
        **measured_weights(trainer, module),
        "seed": module.seed,
        "acting": asdict(module.acting),
        "sources": sources,
    }


def measured_weights(trainer: Trainer, module: Pi05Module) -> dict[str, Any]:
    """The checkpoint that a command was given, the hash of its weights, and their step; None where there was none."""
    path, found = trainer.ckpt_path, module.restored_hash
    return {
        "checkpoint": str(path) if path else None,
        "sha256": measured_hash(trainer, path) if path and found is None else found,
        "step": module.measured_step,
    }


def measured_hash(trainer: Trainer, path: str | Path) -> str:
    """`Weights.content_hash` of what a checkpoint is validated and predicted with: its average, if that is used."""
    return TrainingCheckpoint(Path(path), averaged=validates_average(trainer)).content_hash()
