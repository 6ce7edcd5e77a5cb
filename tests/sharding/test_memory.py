"""No rank of a sharded run ever has the whole model, nor reads the whole of its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded_memory import LARGE, taken
from sharded_ranks import on_ranks

from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.folder import save

RANKS = 4


@pytest.mark.slow
def test_a_rank_makes_its_part_in_less_memory_than_the_whole_takes(videos: Path, fast: Path, tmp_path: Path) -> None:
    model = Pi05(LARGE)
    torch.manual_seed(0)
    model.reset_parameters()
    save(tmp_path / "weights", model)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    data = str(videos), str(fast), RANKS
    for at_random in on_ranks(RANKS, taken, *data, None):
        assert 1 / RANKS < at_random / whole < 0.6
    for from_file in on_ranks(RANKS, taken, *data, str(tmp_path / "weights")):
        assert 1 / RANKS < from_file / whole < 0.75  # the slice itself, and its pages of the file
