"""What is wrong on one rank of a sharded run ends all of them, or is left out on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sharded_ranks import on_ranks
from sharded_troubles import SICK, apart, troubles

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(videos: Path, fast: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, troubles, str(videos), str(fast), str(tmp_path_factory.mktemp("run")))


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_before_the_step_which_can_be_gone_on_from(
    ranks: list[dict[str, Any]],
) -> None:
    for found in ranks:
        assert found["sick"].startswith(f"StepNotFinite: step {SICK} (stage posttrain): the loss flow is nan")
        assert found["saved"] == SICK


def test_a_step_with_such_a_loss_is_left_out_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [found["skipped"] for found in ranks] == [[True], [True]]


def test_replicas_that_do_not_divide_the_ranks_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "replicas of the strategy fsdp2 is 3, which does not divide the 2 ranks" in found["replicas"]


def test_a_head_that_looks_at_values_is_tried_with_the_gathered_weights(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["values"] == ""
        assert found["small values"].startswith("ValueError: stage posttrain, robot/continuous")
        assert found["small values"].endswith("actions are too small")


def test_ranks_on_two_machines_need_the_memory_of_the_lesser_and_one_folder(videos: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, apart, str(videos), str(tmp_path / "run"))
    assert len(first["memory"]) == 1
    assert first["memory"][0].endswith("; 3 GiB are free")  # half of it
    for found in (first, second):
        assert f"ValueError: {tmp_path}/run/second, where the run is saved, is not the same" in found["refused"]
