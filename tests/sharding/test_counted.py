"""What each rank of a sharded run keeps and sends, counted on the sharded model with ranks that are not there."""

from __future__ import annotations

import pytest
import torch

from pi05_lightning.cli.profile import profile
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.profiling.step import StepShape
from pi05_lightning.profiling.strategies import Strategy, count
from pi05_lightning.profiling.workload import Workload

SHAPE = StepShape(batch_size=2, cameras=2, prompt_tokens=5, target_tokens=4)


def bf16(config: ModelConfig, weights: torch.dtype = torch.bfloat16) -> Workload:
    return Workload(config, SHAPE, checkpointing=True, weights=weights, dtype=torch.bfloat16)


def check_bounds(work: Workload, ranks: int) -> None:
    """What is sent, against three times the parameters in bf16."""
    whole, rank = count(work, Strategy(1)), count(work, Strategy(ranks, ranks))
    assert rank.kept <= 1.15 * whole.kept / ranks + rank.group
    sent = 3 * 2 * whole.weights // work.weights.itemsize
    assert 0.5 * sent < rank.sent <= 1.05 * sent


@pytest.mark.parametrize(
    ("ranks", "weights"),
    [
        (64, torch.float32),
        pytest.param(64, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(8, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_each_rank_keeps_its_part_and_sends_three_times_the_parameters(ranks: int, weights: torch.dtype) -> None:
    check_bounds(bf16(ModelConfig.preset("debug"), weights), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("ranks", [8, 64])
def test_bounds_hold_at_full_size(ranks: int, weights: torch.dtype) -> None:
    check_bounds(bf16(ModelConfig(), weights), ranks)


@pytest.mark.slow
def test_replicas_keep_more_each_and_sum_their_gradients() -> None:
    work = bf16(ModelConfig.preset("debug"))
    sharded, replicated = count(work, Strategy(8, 8)), count(work, Strategy(8, 4))
    assert replicated.weights == pytest.approx(2 * sharded.weights, rel=0.05)


def test_adapters_send_little() -> None:
    work = bf16(ModelConfig.preset("debug"))
    whole, adapters = count(work, Strategy(8)), count(work, Strategy(8, lora=True))
    assert adapters.sent < 0.3 * whole.sent
    assert adapters.optimizer < 0.3 * whole.optimizer


@pytest.mark.slow
def test_command_prints_the_strategies_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    profile("debug", devices=4, strategy="fsdp2")
    printed = capsys.readouterr().out
    for words in ("bf16 over fp32 weights", "fsdp2", "hsdp 2 × 2", "ddp", "LoRA", "nf4", "three times the parameters"):
        assert words in printed
