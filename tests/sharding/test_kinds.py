"""No rank waits for another one for what only one of them has: images, actions, targets, places."""

from __future__ import annotations

import pytest
import torch
from sharded_kinds import KINDS, of_one_process, of_two_ranks
from sharded_ranks import on_ranks
from torch import Tensor

PATIENCE = 120  # seconds


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(2, of_two_ranks, request.param, patience=PATIENCE)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_one_process(ranks: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    expected = of_one_process(KINDS[name])
    for rank in ranks:
        assert rank[name].keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(rank[name][parameter], gradient, rtol=1e-5, atol=1e-6, msg=parameter)
