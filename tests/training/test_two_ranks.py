"""Two ranks in two processes, across the stage switch: parts that a stage leaves out break nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module", params=[(), (r"backbone\.vision",)], ids=["nothing frozen", "vision frozen at first"])
def ranks(request: pytest.FixtureRequest, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(videos), str(folder), *request.param]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_stages_are_trained(ranks: list[Any]) -> None:
    assert [rank["step"] for rank in ranks] == [4, 4]


@pytest.mark.parametrize("part", ["weights", "average"])
def test_ranks_end_equal(ranks: list[Any], part: str) -> None:
    first, second = (rank[part] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_what_the_first_rank_finds_before_training_ends_every_rank(videos: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(videos), str(tmp_path), ".*"]  # all is frozen
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0
    assert "ValueError: stage pretrain: nothing is learned from robot/" in done.stderr
    assert not list(tmp_path.glob("*.pt"))


def test_strategies_that_shard_the_weights_are_refused(train: Callable[..., Any]) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    try:
        with pytest.raises(ValueError, match=r"ModelParallelStrategy shards the weights.*use fsdp2"):
            train(strategy=strategy, devices=1)
    finally:
        torch.distributed.destroy_process_group()
