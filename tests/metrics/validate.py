"""A script: validate the debug model on a dataset, on as many ranks as torchrun starts, and write what was measured."""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from pi05_lightning import Pi05DataModule, Pi05Module
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.evaluation.metrics import Measured, Questions
from pi05_lightning.evaluation.report.metrics import write_metrics
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import Term
from pi05_lightning.training.callbacks.examples import ValidationExamples


def answered(*answers: tuple[str, bool]) -> Measured:
    """Answers in words: the question, and whether it was right."""
    right = torch.tensor([is_right for _, is_right in answers])
    words, boxes = torch.ones_like(right), torch.zeros_like(right)
    terms = {"exact_match": Term(right, words), "box_iou": Term(torch.zeros(len(right)), boxes)}
    return Measured(terms, torch.zeros(len(right)), lambda _: [], [question for question, _ in answers])


def main(dataset: str, fast: str, run: str) -> None:
    seed_everything(0)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    source = LeRobotConfig(path=dataset, val_fraction=0.2)
    data = Pi05DataModule({"robot": source}, batch_size=2, num_workers=0, fast=fast, val_samples=7)
    module = Pi05Module(ModelConfig.preset("debug"), num_steps=2)
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=run,
        callbacks=[ValidationExamples(first=1, worst=1)],
    )
    trainer.validate(module, data, verbose=False)
    if trainer.is_global_zero:
        write_metrics(module.results, Path(run))
    with open(f"{run}/rank{trainer.global_rank}.json", "w") as file:
        json.dump(module.results, file)
    questions, rank = Questions(), trainer.global_rank
    questions.update(answered(("of every rank", rank == 0), (f"of rank {rank}", True)))
    with open(f"{run}/questions{rank}.json", "w") as file:
        json.dump(questions.table(), file)
    if world > 1:  # a rank that leaves while another still talks to it may abort
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
