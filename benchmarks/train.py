"""Training steps at `mid`: forward and backward of the flow loss, against LeRobot's on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    TOLERANCE,
    Options,
    Row,
    alternate,
    autocast,
    check_equal,
    run_part,
    speed_up,
)
from benchmarks.limit import limit_seconds, share_of_limit
from benchmarks.peer import build_lerobot, make_inputs, randomize, with_weights_of
from benchmarks.sizes import ALL_PRESENT, DEBUG, MID, PART_PRESENT, Work
from pi05_lightning.models.parallelize import checkpoint_blocks, compile_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.lerobot import to_ours


@dataclass(frozen=True)
class Case:
    """One row: which step, on which work."""

    name: str
    goal: str
    work: Work = PART_PRESENT
    dtype: torch.dtype = torch.float32
    expert_only: bool = False
    """Only the action expert learns; LeRobot's train_expert_only."""
    insulate: bool = False
    """Ours insulates instead, LeRobot, which cannot, freezes: the expert's gradients are the same."""
    checkpoint: bool = False
    share: str = ""
    """The goal of its share of what its matrix products allow, where that is a row too."""


CASES = (
    Case("train, fp32, 2 of 3 cameras, 60 tokens", ">= 3", share=">= 0.9"),
    Case("train, fp32, all present", ">= 1.35", work=ALL_PRESENT),
    Case("train, bf16, 2 of 3 cameras, 60 tokens", ">= 3", dtype=torch.bfloat16, share=">= 0.7"),
    Case("train with activation checkpointing, fp32", ">= 3", checkpoint=True),
    Case("train the expert only, fp32", ">= 4", expert_only=True),
    Case("train insulated, fp32", ">= 4", expert_only=True, insulate=True),
)


def train(options: Options) -> list[Row]:
    """Training steps of π0.5 at `mid` against LeRobot's."""
    rows, our_seconds = [], {}
    for case in CASES:
        of_case, our_seconds[case.name] = measure(case, options)
        rows += of_case
    fp32, bf16 = our_seconds[CASES[0].name], our_seconds[CASES[2].name]
    rows.append(speed_up("train, our bf16 against our fp32", ">= 1.8", (fp32, bf16)))
    rows += [measure_compiled(dtype, options) for dtype in (torch.float32, torch.bfloat16)]
    return rows


def measure_compiled(dtype: torch.dtype, options: Options) -> Row:
    """Ours with `model.compile` against ours without."""
    config = DEBUG if options.quick else MID
    ours, compiled = Pi05(config), Pi05(config)
    randomize(ours)
    compiled.load_state_dict(ours.state_dict())
    compile_blocks(compiled)
    inputs = make_inputs(config, PART_PRESENT)
    steps = [training_step(model, lambda m=model: inputs.our_loss(m), dtype) for model in (ours, compiled)]
    check_equal("loss, compiled", steps[1]().mean(), steps[0]().mean(), TOLERANCE[dtype])
    name = "fp32" if dtype == torch.float32 else "bf16"
    seconds = alternate(steps[0], steps[1], options.pairs)
    return speed_up(f"train, {name}, our model.compile against without", "", seconds)


def measure(case: Case, options: Options) -> tuple[list[Row], list[float]]:
    """The rows, and our seconds."""
    config = DEBUG if options.quick else MID
    print(f"{case.name}: {case.work}", flush=True)
    lerobot = build_lerobot(config, train_expert_only=case.expert_only).train()
    ours = with_weights_of(lerobot, config).train()
    if case.checkpoint:
        lerobot.gradient_checkpointing_enable()
        checkpoint_blocks(ours)
    if case.expert_only and not case.insulate:
        ours.backbone.requires_grad_(False)
    inputs = make_inputs(config, case.work)

    peer_step = training_step(lerobot, lambda: inputs.lerobot_loss(lerobot), case.dtype)
    our_step = training_step(ours, lambda: inputs.our_loss(ours, case.insulate), case.dtype)
    check_step(lerobot, ours, peer_step(), our_step(), case.dtype)
    seconds = alternate(peer_step, our_step, options.pairs)
    rows = [speed_up(case.name, case.goal, seconds)]
    if case.share:
        rows.append(share_of_limit(case.name, case.share, limit_seconds(our_step), seconds[1]))
    return rows, seconds[1]


def training_step(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Forward and backward; it returns the loss per element."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            value = loss()
        value.mean().backward()
        return value.detach()

    return run


def check_step(lerobot: nn.Module, ours: nn.Module, peer_loss: Tensor, our_loss: Tensor, dtype: torch.dtype) -> None:
    """Equal loss and equal gradients, of all parameters together and of each.

    In bf16 single elements differ by roundings in another order; compared are the loss and the gradients' norm.
    """
    tolerance = TOLERANCE[dtype]
    if dtype == torch.bfloat16:
        check_equal("loss", our_loss.mean(), peer_loss.mean(), tolerance)
        return
    check_equal("loss per element", our_loss, peer_loss, tolerance)
    found = {name: p.grad for name, p in ours.named_parameters()}
    expected = {to_ours(name): p.grad for name, p in lerobot.named_parameters() if to_ours(name)}
    scale = max(grad.abs().max() for grad in expected.values() if grad is not None)
    worst = 0.0
    for name, reference in expected.items():
        grad = found[name]
        if reference is None or reference.abs().max() < 1e-6 * scale:
            # in theory zero: SigLIP's key biases, the last layer's queries that nothing reads
            assert grad is None or grad.abs().max() <= 1e-5 * scale, f"{name} has a gradient, LeRobot's has none"
            continue
        assert grad is not None, f"{name} has no gradient, LeRobot's has"
        worst = max(worst, ((grad - reference).abs().max() / reference.abs().max()).item())
    check_equal("every gradient", torch.tensor(1 + worst), torch.tensor(1.0), tolerance)


if __name__ == "__main__":
    run_part(train)
