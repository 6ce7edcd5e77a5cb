"""Training runs of small models on any number of ranks, and what they come to, as one process would have it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.distributed.tensor import DTensor

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.cli.main import main
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.sharding import FSDP2

GLOBAL_BATCH = 4


def two_stages(location: float = 0, **pretrain: Any) -> dict[str, StageOptions]:
    """Every modality that the dataset has; in small batches, of which some lack what others of the step have."""
    words = LossWeights(text=1, subtask=1, fast=1, location=location)
    return {
        "pretrain": StageOptions(
            words, {"robot/qa": 0.4, "robot/hl_subtask": 0.3, "robot/fast_robot_actions": 0.3}, **pretrain
        ),
        "posttrain": StageOptions(
            LossWeights(subtask=1, flow=1), {"robot/hl_subtask": 0.5, "robot/continuous_robot_actions": 0.5}
        ),
    }


def whole(tensor: Tensor) -> Tensor:
    """In memory of its own; every rank must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def weights_of(module: Any) -> dict[str, Tensor]:
    # one rank's whole is its slice itself, which training goes on to write into
    return {name: whole(value).clone() for name, value in module.model.state_dict().items()}


class Notes(DummyLogger, Callback):
    """First weights, losses and gradients of every step, what was validated, chunks by their frame (in ranges)."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.norms: list[float] = []
        self.validated: list[dict[str, float]] = []
        self.chunks: dict[str, Tensor] = {}
        self.begin: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = weights_of(pl_module)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("val/") for name in metrics):
            self.validated.append({name: value for name, value in metrics.items() if name.startswith("val")})
        if "loss/total" in metrics:
            self.losses.append({name: value for name, value in metrics.items() if name.startswith("loss/")})
            self.norms.append(metrics["grad_norm/total"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({name: whole(p.grad) for name, p in named if p.grad is not None})

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        range_of_dims = pl_module.processor.robots[batch.source].normalize.action.span
        shares = torch.tensor(outputs.actions / range_of_dims)
        self.chunks |= {f"{place}": chunk for place, chunk in zip(batch.places, shares, strict=True)}


def train(
    dataset: str,
    fast: str | None,
    ranks: int,
    strategy: Any = "fsdp2",
    model: str | ModelConfig = "debug",
    steps: tuple[int, int] = (10, 10),
    stages: dict[str, StageOptions] | None = None,
    batch_size: int | None = None,
    module: dict[str, Any] | None = None,
    decay: float | None = 0.9,
    predict: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train, and say what came of it: losses, gradients, weights and their average, whole on every rank.

    strategy: of several ranks; one shards nothing, unless it is FSDP2 itself.
    predict: with what was trained, at last.
    """
    seed_everything(0)
    notes, average = Notes(), WeightAverage(decay)
    trained = Pi05Module(
        model if isinstance(model, ModelConfig) else ModelConfig.preset(model),
        **{"optimizer": partial(torch.optim.AdamW, lr=1e-3)} | (module or {}),
    )
    trainer = Trainer(
        devices=ranks,
        strategy=strategy if ranks > 1 or isinstance(strategy, FSDP2) else "auto",
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=notes,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSwitch(*steps, **(stages or two_stages())), average, notes, *callbacks],
        **{"accelerator": "cpu", "limit_val_batches": 0, "enable_checkpointing": False} | options,
    )
    source = LeRobotConfig(path=dataset, val_fraction=0.2)
    accumulate = options.get("accumulate_grad_batches", 1)
    data = Pi05DataModule(
        {"robot": source},
        batch_size=batch_size or GLOBAL_BATCH // ranks // accumulate,
        fast=fast,
        num_workers=0,
        length_window=1,
        val_samples=5,
    )
    trainer.fit(trained, data)
    if predict:
        trainer.predict(trained, data, return_predictions=False)
    return {
        "begin": notes.begin,
        "losses": notes.losses,
        "gradients": notes.gradients,
        "norms": notes.norms,
        "validated": notes.validated,
        "chunks": notes.chunks,
        "weights": weights_of(trained),
        "average": {name: whole(value) for name, value in average.average.items()},
    }


def hsdp(*args: Any, **options: Any) -> dict[str, Any]:
    return train(*args, strategy=FSDP2(replicas=2), **options)


def several(dataset: str, fast: str, ranks: int, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Several runs in the same processes, by name: of each, the options."""
    return {name: train(dataset, fast, ranks, **options) for name, options in cases.items()}


def validate(run: str, out: str, ranks: int) -> None:
    """`pi05 validate`, of which metrics.json is left."""
    on = ["--trainer.devices", str(ranks), "--trainer.strategy", "fsdp2" if ranks > 1 else "auto"]
    main(["validate", run, "--run", out, *on, "--trainer.callbacks", "null", "--trainer.limit_val_batches", "1.0"])
