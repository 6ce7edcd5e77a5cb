"""The sizes that are compared: `mid` fits a laptop, `base` is π0.5; and the inputs that go with them."""

from __future__ import annotations

from dataclasses import dataclass

from pi05_lightning.models.config import GemmaConfig, ModelConfig, VisionConfig

MID = ModelConfig(
    vision=VisionConfig(width=256, depth=6, mlp_dim=4304, num_heads=16),
    language=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    expert=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
    vocab_size=8192,
)
"""Gemma 512×6, expert 256×6, SigLIP 256×6, heads 8/1 of 64; 47 M parameters beside the embedding."""

BASE = ModelConfig()

DEBUG = ModelConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=72, depth=2, mlp_dim=96, num_heads=1),
    language=GemmaConfig(width=48, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=2, mlp_dim=40, num_heads=8, num_kv_heads=1, head_dim=16),
    vocab_size=4096,
    horizon=6,
    action_dim=5,
)
"""For --quick."""


@dataclass(frozen=True)
class Work:
    """One batch: how many rows, which of the cameras are there, how many tokens the prompts have and are padded to."""

    batch: int
    present: tuple[bool, ...] = (True, True, False)
    tokens: int = 60
    padded: int = 200

    def __str__(self) -> str:
        cameras = f"{sum(self.present)} of {len(self.present)} cameras"
        return f"batch {self.batch}, {cameras}, {self.tokens} of {self.padded} tokens"


PART_PRESENT = Work(batch=4)
ALL_PRESENT = Work(batch=4, present=(True, True, True), tokens=200)
ONE_ROBOT = Work(batch=1)
