"""What validation looks like: samples drawn for TensorBoard, and the worst of each modality kept for the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.evaluation.examples import Example
from pi05_lightning.evaluation.report.examples import draw_example, readable
from pi05_lightning.evaluation.report.plots import draw_horizon
from pi05_lightning.evaluation.report.run import EXAMPLES, ExampleFile, Group
from pi05_lightning.evaluation.report.tables import markdown_table
from pi05_lightning.files.local import write_json
from pi05_lightning.files.ranges import check_range
from pi05_lightning.module import Pi05Module
from pi05_lightning.ranks import of_all_ranks

DPI = 110


class ValidationExamples(Callback):
    """Shows the first and the worst samples of every `source/modality`.

    TensorBoard gets figures and texts of the first ones, the same at every validation, and the error over the horizon;
    `pi05 validate` also leaves PNG files in the run's validation/ folder, worst first, for `pi05 report`.

    Args:
        first: samples that are shown at every validation.
        worst: samples that are kept because the model is worst at them.
    """

    def __init__(self, first: int = 2, worst: int = 3) -> None:
        for name, value in {"first": first, "worst": worst}.items():
            check_range(f"ValidationExamples: {name}", value, 0)
        self.first, self.worst = first, worst
        self.fixed: dict[str, list[Example]] = {}
        self.worse: dict[str, list[Example]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fixed, self.worse = defaultdict(list), defaultdict(list)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        measured = outputs["measured"]
        if trainer.sanity_checking or measured is None:
            return
        name = str(datamodule_of(trainer).evaluated_subsets[dataloader_idx])
        error = measured.error.nan_to_num(nan=torch.inf)
        first = list(range(min(self.first - len(self.fixed[name]), len(error))))
        kept = 0 if trainer.state.fn == "fit" else self.worst  # what nobody will see is not sampled
        worst = error.topk(min(kept, len(error))).indices.tolist()
        with torch.no_grad():
            examples = measured.examples([*first, *worst])
        self.fixed[name] += examples[: len(first)]
        of_batch = [replace(e, error=float(error[r])) for e, r in zip(examples[len(first) :], worst, strict=True)]
        self.worse[name] = self._worst([*self.worse[name], *of_batch])

    def _worst(self, examples: Sequence[Example]) -> list[Example]:
        return sorted(examples, key=lambda example: (-example.error, example.key))[: self.worst]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not at the epoch's end, which comes to callbacks before it comes to the module and its results
        if trainer.sanity_checking:
            return
        validating = trainer.state.fn != "fit"
        if validating and trainer.world_size > 1:
            self._gather()
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Pi05Module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._log(logger.experiment, pl_module, pl_module.measured_step)
        if validating:
            self.write(Path(trainer.default_root_dir))

    def _gather(self) -> None:
        """The worst of all ranks, on every rank."""
        everywhere = of_all_ranks(dict(self.worse))
        for name in {name for worse in everywhere for name in worse}:
            self.worse[name] = self._worst([example for worse in everywhere for example in worse.get(name, [])])

    def _log(self, writer: Any, pl_module: Any, step: int) -> None:
        for name, examples in self.fixed.items():
            for number, example in enumerate(examples):
                writer.add_figure(f"{name}/{number}", draw_example(example), step)
            texts = [e for e in examples if e.predicted or e.truth]
            if texts:
                writer.add_text(name, text_table(texts), step)
        for name, values in pl_module.results.items():
            if any(metric.startswith("action_mae/step_") for metric in values):
                writer.add_figure(f"{name}/error_over_horizon", draw_horizon(values), step)

    def write(self, run: Path) -> None:
        """The examples into a run's directory: their pictures and texts, in place of those of an earlier validation."""
        folder = run / EXAMPLES.parent
        folder.mkdir(parents=True, exist_ok=True)
        (run / EXAMPLES).unlink(missing_ok=True)  # whoever is interrupted here leaves none that are of other pictures
        for old in folder.glob("*.png"):
            old.unlink()
        index: dict[str, list[ExampleFile]] = {}
        groups: dict[Group, dict[str, list[Example]]] = {"worst": self.worse, "first": self.fixed}
        for group, by_name in groups.items():
            for name, examples in by_name.items():
                for number, example in enumerate(examples):
                    file = folder / f"{name.replace('/', '-')}-{group}-{number}.png"
                    draw_example(example).savefig(file, dpi=DPI)
                    texts = readable(example.predicted), readable(example.truth)
                    shown = ExampleFile(file.name, group, example.key, *texts)
                    index.setdefault(name, []).append(shown)
        content = {name: [vars(shown) for shown in files] for name, files in index.items()}
        write_json(run / EXAMPLES, content)


def text_table(examples: Sequence[Example]) -> str:
    """Prompt, prediction and truth, as Markdown."""
    rows = [[readable(text) for text in (e.prompt, e.predicted, e.truth)] for e in examples]
    return markdown_table(("prompt", "predicted", "true"), rows)
