"""N accumulated batches are one batch N times as large, on one rank and on two: for every term, and its gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.models.config import ModelConfig

from . import one_step

SCRIPT = Path(one_step.__file__)
TERMS = ("text", "subtask", "fast", "location", "flow", "quiet")


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("fast"), ModelConfig.preset("tiny")
    chunks = np.random.default_rng(0).uniform(-1, 1, (200, config.horizon, 2)).astype(np.float32)
    FastTokenizer.fit(chunks, vocab_size=config.fast_vocab_size, scale=3).save(folder)
    return folder


@pytest.fixture(scope="module")
def one_batch(videos: Path, fast: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return one_step.main(str(videos), str(fast), tmp_path_factory.mktemp("one"), 1, 1)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to rounding: losses of every term, and every parameter's gradient."""
    for step in range(one_step.STEPS):
        losses = found["losses"][step]
        assert losses.keys() == {*(f"loss/posttrain/{term}" for term in TERMS), "loss/total"}
        assert losses == pytest.approx(expected["losses"][step], rel=1e-4)
        gradients, whole = found["gradients"][step], expected["gradients"][step]
        assert gradients.keys() == whole.keys()
        size = torch.stack([x.norm() for x in whole.values()]).norm()
        errors = {name: (gradients[name] - x).norm() / size for name, x in whole.items()}
        assert max(errors.values()) < 1e-5, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("accumulate", [2, 4, 12])
def test_accumulated_batches_give_the_losses_and_gradients_of_one_batch(
    one_batch: dict[str, Any], videos: Path, fast: Path, tmp_path: Path, accumulate: int
) -> None:
    check(one_step.main(str(videos), str(fast), tmp_path, 1, accumulate), one_batch)


def test_accumulated_batches_of_two_ranks_give_the_losses_and_gradients_of_one_batch(
    one_batch: dict[str, Any], videos: Path, fast: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), str(videos), str(fast), str(tmp_path), "2", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        check(torch.load(tmp_path / f"{rank}.pt", weights_only=True), one_batch)
