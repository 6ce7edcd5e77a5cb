"""What the tests of sharded runs share: where the ranks' work is, and a FAST tokenizer."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.models.config import ModelConfig

# the processes import what is there too, whatever else is called `tests` where they are
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "models")]


@pytest.fixture(scope="session")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("fast"), ModelConfig.preset("debug")
    chunks = np.random.default_rng(0).uniform(-1, 1, (200, config.horizon, 2)).astype(np.float32)
    FastTokenizer.fit(chunks, vocab_size=config.fast_vocab_size, scale=3).save(folder)
    return folder
