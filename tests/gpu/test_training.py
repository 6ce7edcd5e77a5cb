"""Training on CUDA: what the CPU computes, without waiting for the host, and the same again after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pi05_lightning.models.parallelize import Lora
from pi05_lightning.types import Batch
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

Fit = Callable[..., Trainer]
TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.found.append(float(outputs["loss"]))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.detach().cpu() for name, x in trainer.lightning_module.named_parameters()}


def test_cuda_goes_on_as_the_cpu_does_through_both_stages(fit: Fit, each_step: ModelCheckpoint, tmp_path: Path) -> None:
    on_cpu, on_cuda = Losses(), Losses()
    fit("cpu", on_cpu, each_step)
    fit("cuda", on_cuda, ckpt_path=tmp_path / "step=1.ckpt")  # random weights depend on the device
    expected = on_cpu.found[1:]
    assert len(on_cuda.found) == len(expected) == TOTAL - 1
    assert on_cuda.found[0] == pytest.approx(expected[0], rel=1e-4)
    # AdamW's first steps have one length, whatever a gradient's, so that roundings grow
    assert on_cuda.found == pytest.approx(expected, rel=5e-3)


def test_bf16_over_fp32_weights_on_cuda_trains_as_fp32_does(fit: Fit) -> None:
    exact, rounded = Losses(), Losses()
    fit("cuda", exact)
    fit("cuda", rounded, precision="bf16-mixed")
    assert rounded.found == pytest.approx(exact.found, rel=0.1)


class NothingWaits(Callback):
    """Whatever waits for the device raises, also while a batch is moved there and changed.

    But for the first batch, and that with which another stage begins.
    """

    allowed = (0, PRETRAIN_STEPS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default" if batch_idx in self.allowed else "error")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        allowed = batch_idx + 1 in (*self.allowed, TOTAL)
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_does_not_wait_for_the_device(fit: Fit, precision: str, checkpointing: bool) -> None:
    try:
        options = {"activation_checkpointing": checkpointing}
        trainer = fit("cuda", NothingWaits(), precision=precision, module_options=options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == TOTAL


def test_adapters_may_begin_with_a_run_of_adapters(fit: Fit, each_step: ModelCheckpoint, tmp_path: Path) -> None:
    fit("cuda", each_step, module_options={"lora": Lora()})
    first = str(tmp_path / f"step={TOTAL}.ckpt")
    assert fit("cuda", module_options={"lora": Lora(), "init_from": first}).global_step == TOTAL


@pytest.mark.parametrize("stopped_at", [PRETRAIN_STEPS - 1, PRETRAIN_STEPS + 1])
def test_a_run_on_cuda_goes_on_exactly_where_it_was_stopped(
    fit: Fit, each_step: ModelCheckpoint, tmp_path: Path, stopped_at: int
) -> None:
    options = {"deterministic": True, "precision": "bf16-mixed"}
    try:
        whole = weights(fit("cuda", each_step, **options))
        resumed = weights(fit("cuda", ckpt_path=tmp_path / f"step={stopped_at}.ckpt", **options))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
