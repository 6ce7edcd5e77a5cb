"""A step to profile: random data of a given size, and the model's own forward pass and sampling on it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Target


@dataclass(frozen=True)
class StepShape:
    """One step's data: observations, cameras, prompt tokens, tokens to predict, and noise draws."""

    batch_size: int = 1
    cameras: int = 2
    prompt_tokens: int = 60
    target_tokens: int = 0
    draws: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "draws"):
            check_range(name, getattr(self, name), 1)
        for name in ("cameras", "target_tokens"):
            check_range(name, getattr(self, name), 0)

    @property
    def for_chunk(self) -> StepShape:
        """A robot asks for one chunk at a time, and there is nothing to predict."""
        return replace(self, batch_size=1, target_tokens=0, draws=1)

    def batch(self, config: ModelConfig, device: torch.device | str = "cpu") -> Batch:
        """Random data of this size on a device."""
        rows, length, size = self.batch_size, self.prompt_tokens + self.target_tokens, config.vision.image_size
        is_target = torch.arange(length) >= self.prompt_tokens
        # by arithmetic: on fake tensors nobody can look where the targets are
        index = (torch.arange(rows)[:, None] * length + torch.arange(self.prompt_tokens, length)).flatten()
        target_kind = (is_target * int(Target.FAST)).to(torch.uint8).expand(rows, -1)
        actions = torch.randn(rows, config.horizon, config.action_dim)
        batch = Batch(
            pixels=torch.randint(0, 256, (rows * self.cameras, 3, size, size), dtype=torch.uint8),
            image_index=torch.arange(rows * self.cameras),
            camera=torch.arange(self.cameras).repeat(rows),
            image_mask=torch.ones(rows, self.cameras, dtype=torch.bool),
            tokens=torch.randint(config.vocab_size, (rows, length)),
            token_mask=torch.ones(rows, length, dtype=torch.bool),
            causal=is_target.expand(rows, -1),
            target_kind=target_kind,
            target_index={Target.TEXT: index[:0], Target.SUBTASK: index[:0], Target.FAST: index},
            actions=actions,
            action_mask=torch.ones_like(actions, dtype=torch.bool),
            key=torch.arange(rows),
            noise=torch.randn(rows, self.draws, config.horizon, config.action_dim),
            time=torch.rand(rows, self.draws),
        )
        return batch.to(device)


def training_loss(model: Pi05, batch: Batch, insulate: bool = False, terms: Collection[str] | None = None) -> Tensor:
    """The sum of all terms, or of some, that the batch has targets of: a scalar with its graph."""
    return torch.stack([term.values.mean() for term in model(batch, terms, insulate=insulate).values()]).sum()
