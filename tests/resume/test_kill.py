"""Runs that were killed with SIGKILL, however often and wherever, end as if they had not been."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from killable_fit import KILL_AT_BATCH, digest, fit, lines
from two_stages import ACCUMULATE, POSTTRAIN_STEPS, PRETRAIN_STEPS

from pi05_lightning.weights.sharded_checkpoint import read

BATCHES = ACCUMULATE * (PRETRAIN_STEPS + POSTTRAIN_STEPS)
SWITCH = ACCUMULATE * PRETRAIN_STEPS
KILLS = {
    2: "in the first stage, between two batches of a step",
    SWITCH - 1: "at the switch, before the last step of the first stage is saved",
    SWITCH: "at the switch, with one batch of the second stage accumulated",
    SWITCH + 3: "after the switch",
}


def state(run: Path) -> dict[str, Any]:
    return read(run / "checkpoints" / "last.ckpt")


pytestmark = pytest.mark.slow  # test_three_stages.py has kills that are not
Killed = tuple[Path, int, str]
CASES = [
    pytest.param((0, 1, "ddp"), id="0-workers-1-rank"),
    pytest.param((2, 1, "ddp"), id="2-workers-1-rank"),
    pytest.param((0, 2, "ddp"), id="0-workers-2-ranks"),
    pytest.param((2, 2, "ddp"), id="2-workers-2-ranks"),
    pytest.param((0, 2, "fsdp2"), id="0-workers-2-ranks-sharded"),
]


@pytest.fixture(scope="session", params=CASES)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, config: Path) -> Killed:
    """A run that was killed at each of KILLS and then brought to its end, its number of ranks and its strategy."""
    workers, ranks, strategy = request.param
    folder = tmp_path_factory.mktemp("killed")
    run, log = folder / "run", folder / "log"
    start = ["-c", str(config), "--run", str(run), "--data.num_workers", str(workers)]
    for number, batch in enumerate(KILLS):
        args = ["--ckpt_path", str(run)] if number else start
        codes = fit(args, log, ranks, strategy, **{KILL_AT_BATCH: batch})
        assert codes == [-signal.SIGKILL] * ranks, log.read_text()
    codes = fit(["--ckpt_path", str(run)], log, ranks, strategy)
    assert codes == [0] * ranks, log.read_text()
    return run, ranks, strategy


def test_killed_run_ends_with_the_same_weights_and_optimizer_state(killed: Killed, whole: Any) -> None:
    run, *ranks = killed
    found, expected = state(run), state(whole(*ranks))
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ema"):
        assert digest(found[part]) == digest(expected[part]), part


def test_killed_run_did_every_batch_as_the_whole_one(killed: Killed, whole: Any) -> None:
    run, ranks, strategy = killed
    for rank in range(ranks):
        found, expected = lines(run, rank), lines(whole(ranks, strategy), rank)
        assert list(expected) == list(range(BATCHES))
        assert found.keys() == expected.keys()
        for batch, attempts in found.items():
            for line in attempts:
                assert line == expected[batch][0], batch
