"""A FAST tokenizer where it matters that there is one, not which: fitted on chunks that are drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Shapes


def random_fast(sizes: ModelConfig | Shapes, dims: int = 2, seed: int = 0, **options: Any) -> FastTokenizer:
    """For chunks of a model's horizon and so many action dims; of its vocabulary, where `options` name no other."""
    chunks = np.random.default_rng(seed).uniform(-1, 1, (200, sizes.horizon, dims)).astype(np.float32)
    return FastTokenizer.fit(chunks, **{"vocab_size": sizes.fast_vocab_size} | options)
