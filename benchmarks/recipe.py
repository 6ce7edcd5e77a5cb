"""What the whole recipe costs over flow matching alone: text and FAST cross-entropy, and four noise draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.harness import Options, Row, alternate, flops_of, run_part, share
from benchmarks.peer import make_inputs, randomize
from benchmarks.sizes import BASE, DEBUG, MID, ONE_ROBOT, PART_PRESENT, Work
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Target, index_targets

TEXT_TOKENS, FAST_TOKENS = 10, 40  # a subtask; a chunk's FAST tokens (published: 20 to 53 for a second)
DRAWS = 4


def recipe(options: Options) -> list[Row]:
    """Full recipe (text + FAST + flow with 4 draws) over flow only with one draw, ours on both sides."""
    base, mid = (DEBUG, DEBUG) if options.quick else (BASE, MID)
    flow, full = steps(base, ONE_ROBOT, device="meta")
    flops = [flops_of(step) / 1e12 for step in (flow, full)]
    rows = [share("full recipe over flow only, FLOPs, base", "<= 1.3", "TFLOP", flops[:1], flops[1:])]
    flow_seconds, full_seconds = alternate(*steps(mid, PART_PRESENT), options.pairs)
    name = f"full recipe over flow only, time, mid, vocabulary {mid.vocab_size}"
    return [*rows, share(name, "<= 1.3", "s", flow_seconds, full_seconds)]


def steps(config: ModelConfig, work: Work, device: str = "cpu") -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of flow alone, and of the full recipe."""
    with torch.device(device):
        model = Pi05(config)
    if device != "meta":
        randomize(model)
    batch = make_inputs(config, work, device).batch
    everything = with_targets(batch, config)

    def run(batch: Batch, weights: dict[str, float]) -> None:
        model.zero_grad(set_to_none=True)
        terms = model(batch, weights)
        sum(weight * terms[name].values.mean() for name, weight in weights.items()).backward()

    return lambda: run(batch, {"flow": 1.0}), lambda: run(everything, {"flow": 10.0, "subtask": 1.0, "fast": 1.0})


def with_targets(batch: Batch, config: ModelConfig) -> Batch:
    """The batch with a subtask and FAST tokens to predict behind every prompt, and more noise draws."""
    rows, prompt = batch.tokens.shape
    kinds = torch.tensor([Target.SUBTASK] * TEXT_TOKENS + [Target.FAST] * FAST_TOKENS, dtype=torch.uint8)
    added, device = len(kinds), batch.tokens.device
    target_kind = torch.cat([torch.full((rows, prompt), Target.NONE, dtype=torch.uint8), kinds.expand(rows, -1)], 1)
    assert batch.noise is not None
    assert batch.time is not None
    return replace(
        batch,
        tokens=torch.cat([batch.tokens, torch.randint(2, config.vocab_size, (rows, added)).to(device)], 1),
        token_mask=torch.cat([batch.token_mask, torch.ones(rows, added, dtype=torch.bool, device=device)], 1),
        causal=torch.cat([batch.causal, torch.ones(rows, added, dtype=torch.bool, device=device)], 1),
        target_kind=target_kind.to(device),
        target_index={target: index.to(device) for target, index in index_targets(target_kind).items()},
        noise=batch.noise.expand(-1, DRAWS, -1, -1) * 1.0,
        time=batch.time.expand(-1, DRAWS) * 1.0,
    )


if __name__ == "__main__":
    run_part(recipe)
