"""A small model with random weights, and batches written as strings of token kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pi05_lightning.models.config import GemmaConfig, ModelConfig, VisionConfig
from pi05_lightning.models.heads.base import Terms
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import NUM_LOC, NUM_SEG, Batch, Target, index_targets

KINDS = {"p": Target.NONE, "o": Target.SAID, "t": Target.TEXT, "s": Target.SUBTASK, "f": Target.FAST}


def small_config(depth: int = 2, **changes: object) -> ModelConfig:
    """One image is one token, so that every token can be changed alone."""
    config = ModelConfig(
        vision=VisionConfig(image_size=14, patch_size=14, width=24, depth=1, mlp_dim=32, num_heads=2),
        language=GemmaConfig(width=32, depth=depth, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8),
        expert=GemmaConfig(width=24, depth=depth, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8),
        vocab_size=128 + NUM_LOC + NUM_SEG,
        fast_vocab_size=32,
        horizon=3,
        action_dim=4,
    )
    return replace(config, **changes)


@torch.no_grad()
def small_model(config: ModelConfig | None = None, seed: int = 0) -> Pi05:
    """Every weight random, the zero-initialised ones too."""
    model = Pi05(config or small_config())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.normal_(0, std, generator=generator)
    # small, else the residual stream carries each token to the output, to be said again
    model.backbone.embed_tokens.weight.mul_(0.2)
    return model


def make_batch(config: ModelConfig, rows: Sequence[str], *, acting: int = 0, draws: int = 1, seed: int = 0) -> Batch:
    """A batch from one string per row: `i` per image, then p prompt, o the policy's own words, t text, s
    subtask, f FAST per token.

    The first `acting` rows carry actions.  Row r is the same whatever rows and padding are beside it.
    """
    size = config.vision.image_size
    slots, length = max(row.count("i") for row in rows), max(len(row.lstrip("i")) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    kind = torch.zeros(len(rows), length, dtype=torch.uint8)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    image_mask = torch.zeros(len(rows), slots, dtype=torch.bool)
    pixels, index, camera, actions, noise, time = [], [], [], [], [], []
    for r, row in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 * seed + r)
        text = row.lstrip("i")
        for place in range(row.count("i")):
            pixels.append(torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator))
            index.append(r * slots + place)
            camera.append(place)
            image_mask[r, place] = True
        tokens[r, : len(text)] = torch.randint(2, config.vocab_size, (len(text),), generator=generator)
        kind[r, : len(text)] = torch.tensor([KINDS[letter] for letter in text], dtype=torch.uint8)
        mask[r, : len(text)] = True
        actions.append(torch.randn(config.horizon, config.action_dim, generator=generator))
        noise.append(torch.randn(draws, config.horizon, config.action_dim, generator=generator))
        time.append(torch.rand(draws, generator=generator))

    def first(values: list[Tensor]) -> Tensor:
        return torch.stack(values)[:acting]

    return Batch(
        pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        image_index=torch.tensor(index, dtype=torch.long),
        camera=torch.tensor(camera, dtype=torch.long),
        image_mask=image_mask,
        tokens=tokens,
        token_mask=mask,
        causal=((kind > 0).cumsum(1) > 0) & mask,
        target_kind=kind,
        target_index=index_targets(kind),
        actions=first(actions),
        action_mask=torch.ones_like(first(actions), dtype=torch.bool),
        key=torch.arange(len(rows)),
        noise=first(noise),
        time=first(time),
    )


def token_nll(terms: Terms) -> Tensor:
    """Cross-entropy of every target token, f32[N], kind by kind."""
    return torch.cat([terms[name].values for name in ("text", "subtask", "fast") if name in terms])


def change_column(batch: Batch, column: int, row: int = 0) -> Batch:
    """The batch with another image or token at one column of a row; columns count images first."""
    slots = batch.image_mask.shape[1]
    if column < slots:
        pixels = batch.pixels.clone()
        pixels[batch.image_index == row * slots + column] ^= 255
        return replace(batch, pixels=pixels)
    tokens = batch.tokens.clone()
    tokens[row, column - slots] = (tokens[row, column - slots] + 50) % 100 + 2
    return replace(batch, tokens=tokens)
