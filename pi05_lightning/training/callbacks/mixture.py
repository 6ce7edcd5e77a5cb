"""What was really drawn: shares, padding, and the samples that were bad."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.files.local import replacing
from pi05_lightning.module import Pi05Module
from pi05_lightning.training.callbacks.interrupt import within_step
from pi05_lightning.types import Batch

BAD_SAMPLES = "bad_samples.jsonl"


class MixtureLog(Callback):
    """Logs `mixture/<source>/<modality>`, `data/padding` and `data/bad_samples` at the trainer's logging interval.

    Shares are of the draws since the last interval, padding of the positions that the backbone computed, image slots
    included; both are counted on the host, on the first rank. Every bad sample is a line of bad_samples.jsonl in the
    run; further ranks' files carry their number.
    """

    def __init__(self) -> None:
        self.draws: Counter[str] = Counter()
        self.positions = self.valid = 0
        self.logged_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draws.clear()
        self.positions = self.valid = 0
        self.logged_step = trainer.global_step
        file = bad_samples_of(trainer)
        if file.exists():  # later steps are drawn anew, and have the same bad samples
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            with replacing(file) as whole:
                whole.write_text(
                    "".join(line for line in lines if json.loads(line)["step"] < trainer.global_step), encoding="utf-8"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Pi05Module)
        assert batch.drawn is not None
        self.draws.update(batch.drawn.names)
        per_image = pl_module.model.backbone.vision.num_tokens
        self.valid += len(batch.pixels) * per_image + batch.drawn.text_tokens
        self.positions += batch.image_mask.numel() * per_image + batch.tokens.numel()
        if batch.drawn.skipped:
            self._list(batch.drawn.skipped, trainer)
        step = trainer.global_step
        if step != self.logged_step and pl_module.logs_after(step):
            self.logged_step = step
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        total = self.draws.total()
        values = {f"mixture/{name}": draws / total for name, draws in self.draws.items()}
        values["data/padding"] = 1 - self.valid / self.positions
        values["data/bad_samples"] = float(datamodule_of(trainer).bad_samples.bad)
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step - 1)
        # names stay, so that what is no longer drawn shows as 0
        self.draws = Counter(dict.fromkeys(self.draws, 0))
        self.positions = self.valid = 0

    def _list(self, problems: tuple[str, ...], trainer: Trainer) -> None:
        step = trainer.global_step if within_step(trainer) else trainer.global_step - 1
        with bad_samples_of(trainer).open("a", encoding="utf-8") as lines:
            for problem in problems:
                lines.write(json.dumps({"step": step, "problem": problem}) + "\n")


def bad_samples_of(trainer: Trainer) -> Path:
    """The file of this rank's bad samples."""
    file = Path(trainer.default_root_dir, BAD_SAMPLES)
    return file.with_stem(f"{file.stem}-{trainer.global_rank}") if trainer.global_rank else file
