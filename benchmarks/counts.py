"""Work and memory at `base`, counted, not timed: FLOPs on meta tensors, peak bytes by the tracker on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import Options, Row, flops_of, run_part, share
from benchmarks.peer import Inputs, build_lerobot, make_inputs
from benchmarks.sizes import BASE, DEBUG, ONE_ROBOT
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import checkpoint_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.profiling.memory import make_fake, step_memory
from pi05_lightning.profiling.step import StepShape
from pi05_lightning.profiling.strategies import Strategy, count
from pi05_lightning.profiling.workload import Workload


def counts(options: Options) -> list[Row]:
    """FLOPs and peak memory of a training step at `base`, and FLOPs of a chunk, against LeRobot's."""
    config = DEBUG if options.quick else BASE
    rows = []
    for name, goal, checkpointing in (
        ("FLOPs of a training step with checkpointing, base", "<= 0.47", True),
        ("FLOPs of a training step, base", "", False),
    ):
        flops = [step_flops(*side, config) for side in sides(config, checkpointing)]
        rows.append(share(name, goal, "TFLOP", [flops[0] / 1e12], [flops[1] / 1e12]))
    flops = [chunk_flops(config, peer=True), chunk_flops(config, peer=False)]
    rows.append(share("FLOPs of one chunk, base", "", "TFLOP", [flops[0] / 1e12], [flops[1] / 1e12]))
    for name, checkpointing in (
        ("peak activation memory of a training step with checkpointing, base", True),
        ("peak activation memory of a training step, base", False),
    ):
        memory = [peak(*side, config) for side in sides(config, checkpointing)]
        rows.append(share(name, "<= 0.5", "GiB", [memory[0] / 2**30], [memory[1] / 2**30]))
    return rows + sharded(config, (8,) if options.quick else (1, 8, 64))


def sharded(config: ModelConfig, numbers: Sequence[int]) -> list[Row]:
    """Of each of so many ranks, bf16 over fp32 weights: what it keeps, over its share of the whole, and what it sends.

    That is over three times the parameters in bf16.
    """
    work = Workload(config, StepShape(target_tokens=50), checkpointing=True, dtype=torch.bfloat16)
    whole = count(work, Strategy(1))
    rows = []
    for ranks in numbers:
        rank = count(work, Strategy(ranks, ranks)) if ranks > 1 else whole
        bound = 1.15 * whole.kept / ranks + rank.group
        name = f"sharded, {ranks} rank{'s' * (ranks > 1)}: "
        kept = [bound / 2**30], [rank.kept / 2**30]
        rows.append(share(f"{name}weights, gradients, AdamW and average, over the bound", "<= 1", "GiB", *kept))
        if ranks > 1:
            name += "sent in a step, over three times the parameters in bf16"
            rows.append(share(name, "<= 1.05", "GiB", [3 * whole.weights / 2 / 2**30], [rank.sent / 2**30]))
    return rows


def sides(config: ModelConfig, checkpointing: bool) -> list[tuple[nn.Module, Callable[[Inputs], Tensor]]]:
    """LeRobot's model and ours without memory, each with its training loss."""
    with torch.device("meta"):
        lerobot, ours = build_lerobot(config).train(), Pi05(config).train()
    if checkpointing:
        lerobot.gradient_checkpointing_enable()
        checkpoint_blocks(ours)
    return [(lerobot, lambda x: x.lerobot_loss(lerobot)), (ours, lambda x: x.our_loss(ours))]


def step_flops(model: nn.Module, loss: Callable[[Inputs], Tensor], config: ModelConfig) -> int:
    inputs = make_inputs(config, ONE_ROBOT, device="meta")
    return flops_of(lambda: loss(inputs).mean().backward())


def chunk_flops(config: ModelConfig, peer: bool) -> int:
    inputs = make_inputs(config, ONE_ROBOT, device="meta")
    (lerobot, _), (ours, _) = sides(config, checkpointing=False)
    with torch.no_grad():
        if peer:
            return flops_of(lambda: inputs.lerobot_chunk(lerobot.eval()))
        return flops_of(lambda: inputs.our_chunk(ours.eval()))


def peak(model: nn.Module, loss: Callable[[Inputs], Tensor], config: ModelConfig) -> int:
    """Bytes beside parameters and their gradients, at most, in forward and backward.

    The embedding is frozen: its gradient is large in a moment when little else is left.
    """
    fake = FakeTensorMode()
    make_fake(model, fake)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = not isinstance(module, nn.Embedding)
    with fake:
        inputs = make_inputs(config, ONE_ROBOT)
    return step_memory(model, lambda: loss(inputs).mean(), fake, accumulates=True).activations


if __name__ == "__main__":
    run_part(counts)
