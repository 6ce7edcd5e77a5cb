"""The three precisions through both stages: what has which type, and that validation and prediction run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from pi05_lightning.module import default_optimizer
from pi05_lightning.training.precision import check_scaled
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]
WEIGHTS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
COMPUTE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


class Types(Callback):
    """Notes what type losses, targets and the output of a linear layer have, and that losses are finite."""

    def __init__(self) -> None:
        self.linear: set[torch.dtype] = set()
        self.loss: set[torch.dtype] = set()
        self.actions: set[torch.dtype] = set()
        self.finite = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(module: torch.nn.Module, args: Any, output: Tensor) -> None:
            self.linear.add(output.dtype)

        for part in (pl_module.model.backbone, pl_module.model.flow_head):
            part.layers[0].mlp.up_proj.register_forward_hook(note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loss.add(outputs["loss"].dtype)
        self.actions |= {batch.actions.dtype, batch.noise.dtype, batch.time.dtype}
        self.finite &= bool(outputs["loss"].isfinite())


@pytest.mark.slow_cases
@pytest.mark.parametrize("precision", WEIGHTS)
def test_both_stages_validation_and_prediction_run(train: Train, tmp_path: Path, precision: str) -> None:
    types = Types()
    validation = {"limit_val_batches": 1, "val_check_interval": TOTAL, "check_val_every_n_epoch": None}
    trainer = train(types, precision=precision, limit_predict_batches=1, **validation)
    assert types.linear == {COMPUTE[precision]}
    assert types.loss == types.actions == {torch.float32}
    assert types.finite
    saved = torch.load(tmp_path / f"step={TOTAL}.ckpt", weights_only=True)["state_dict"].values()
    assert {x.dtype for x in saved} == {WEIGHTS[precision]}
    predicted = trainer.predict(trainer.lightning_module, trainer.datamodule)
    assert predicted
    assert all(found.actions.dtype == np.float32 and np.isfinite(found.actions).all() for found in predicted)


class NormsOfSteps(Callback):
    """The norm of all gradients that an optimizer step was taken with."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        grads = [p.grad.float() for p in pl_module.parameters() if p.grad is not None]
        self.norms += [torch.nn.utils.get_total_norm(grads).item()] if grads else []


@pytest.mark.parametrize("precision", WEIGHTS)
def test_gradients_are_clipped_for_the_default_optimizer_which_is_fused(train: Train, precision: str) -> None:
    steps = NormsOfSteps()
    train(steps, precision=precision, gradient_clip_val=1e-3, module_options={"optimizer": default_optimizer})
    assert steps.norms
    assert max(steps.norms) < 1.01e-3
    assert max(steps.norms) > 0.9e-3


def test_norms_that_are_logged_are_of_gradients_that_nothing_scales(train: Train) -> None:
    class Norms(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            norms.extend(value for name, value in metrics.items() if name == "grad_norm/total")

    norms: list[float] = []
    for fused in (False, True):
        scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
        steps = {"max_steps": 1, "log_every_n_steps": 1, "logger": Norms()}
        train(plugins=[scaled], module_options={"optimizer": optimizer}, **steps)
    assert norms == [norms[0], pytest.approx(norms[0])]


def test_fused_optimizers_are_refused_where_gradients_are_scaled() -> None:
    scaled = MixedPrecision("16-mixed", "cpu")
    trainer = Trainer(accelerator="cpu", plugins=[scaled], logger=False, gradient_clip_val=1.0)
    for fused in (False, True):
        trainer.optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=fused)]
        with pytest.raises(ValueError, match="fused: false") if fused else nullcontext():
            check_scaled(trainer)
