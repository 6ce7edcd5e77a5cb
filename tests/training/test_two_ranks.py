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


FREEZING = [
    pytest.param((), id="nothing frozen", marks=pytest.mark.slow),
    pytest.param((r"backbone\.vision",), id="vision frozen at first"),
]


@pytest.fixture(scope="module", params=FREEZING)
def ranks(request: pytest.FixtureRequest, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(videos), str(folder), *request.param]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_all_stages_are_trained(ranks: list[Any]) -> None:
    assert [rank["step"] for rank in ranks] == [6, 6]


@pytest.mark.parametrize("part", ["weights", "average"])
def test_ranks_end_equal(ranks: list[Any], part: str) -> None:
    first, second = (rank[part] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_ddp_searches_only_where_batches_train_different_parameters(ranks: list[Any]) -> None:
    # words alone; words or actions, which one batch may have without the other; actions alone
    assert ranks[0]["searches"] == ranks[1]["searches"] == [False, False, True, True, False, False]
    waited, got = ranks[0]["waits_for"], [len(gradients) for gradients in ranks[0]["gradients"]]
    assert [waited[step] for step in (0, 1, 4, 5)] == [got[step] for step in (0, 1, 4, 5)]
    assert waited[0] < waited[4] < waited[2] == len(ranks[0]["weights"])
    assert ranks[0]["alive"] == [1] * 6  # each is gone when the next stage's is there


@pytest.mark.parametrize("part", ["losses", "gradients", "weights", "average"])
def test_what_is_trained_is_the_same_bits_as_with_one_ddp_that_searches(ranks: list[Any], part: str) -> None:
    for rank in ranks:
        assert all(rank["searching"]["searches"])
        torch.testing.assert_close(rank[part], rank["searching"][part], rtol=0, atol=0)


@pytest.mark.slow
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
