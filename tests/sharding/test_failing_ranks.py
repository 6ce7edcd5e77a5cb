"""A rank that dies, fails or hangs ends the others within a minute, and they say which it was and why."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from failing_ranks import LOOSE, end_of, fates, since_failure
from killable_fit import fit

MINUTE = 60
STRATEGIES = ("ddp", "fsdp2")
LAUNCHER = [sys.executable, "-m", "pi05_lightning"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "pi05_lightning"]


def described(config: Path, run: Path) -> list[str]:
    return ["-c", str(config), "--run", str(run), "--data.num_workers", "0"]


def apart(config: Path, run: Path, strategy: str, *more: str) -> tuple[list[int | None], str]:
    """Exit codes and output of two ranks that nobody watches, as on two machines."""
    log = run.parent / "log"
    codes = fit([*described(config, run), *more], log, 2, strategy, kill_others=False)
    assert since_failure(run) < MINUTE
    return codes, log.read_text()


def launched(launcher: list[str], config: Path, run: Path, strategy: str, *more: str) -> tuple[int, str]:
    """Exit code and output of the command that starts two ranks."""
    here = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    devices = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    return end_of([*launcher, "fit", *described(config, run), *devices, *more], PYTHONPATH=here)


@pytest.mark.slow
def test_rank_ends_with_the_first_one_that_is_killed(two_stages: Path, tmp_path: Path) -> None:
    codes, log = apart(two_stages, tmp_path / "run", "fsdp2", *fates(rank0="killed"))
    assert codes == [-9, 1]
    assert "rank 0 is gone" in log


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_ends_with_another_that_is_killed(two_stages: Path, tmp_path: Path, strategy: str) -> None:
    codes, log = apart(two_stages, tmp_path / "run", strategy, *fates(rank1="killed"))
    assert codes == [1, -9]
    assert "rank 1 was killed or hangs" in log


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_that_no_broken_connection_reaches_ends_with_the_one_that_fails(
    two_stages: Path, tmp_path: Path, strategy: str
) -> None:
    codes, log = apart(two_stages, tmp_path / "run", strategy, *fates(rank0="hangs", rank1="raises"))
    assert codes == [1, 1]
    assert f"rank 0 ends: rank 1 failed: RuntimeError: {LOOSE}" in log


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_that_no_broken_connection_reaches_ends_with_the_first_one_that_is_killed(
    two_stages: Path, tmp_path: Path, strategy: str
) -> None:
    codes, log = apart(two_stages, tmp_path / "run", strategy, *fates(rank0="killed", rank1="hangs"))
    assert codes == [-9, 1]
    assert "rank 1 ends: rank 0 is gone" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        '{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: "0:00:10"}}',
        '{class_path: pi05_lightning.training.sharding.FSDP2, init_args: {timeout: "0:00:10"}}',
    ],
    ids=STRATEGIES,
)
def test_deadlock_ends_at_the_timeout_of_the_strategy(two_stages: Path, tmp_path: Path, strategy: str) -> None:
    codes, log = apart(two_stages, tmp_path / "run", strategy, *fates(rank1="hangs"))
    assert codes == [1, 1]
    assert "rank 1 was killed or hangs" in log


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("fate", "said"),
    [
        ({"rank0": "killed"}, "rank 0 is gone"),
        # in the race between the two, Lightning kills the first rank or that one says it
        ({"rank1": "killed"}, ("rank 1 was killed by SIGKILL", "[rank: 1] Child process with PID")),
        ({"rank0": "raises"}, f"rank 0 failed: RuntimeError: {LOOSE}"),
        ({"rank1": "raises"}, f"rank 1 failed: RuntimeError: {LOOSE}"),
    ],
    ids=["first killed", "second killed", "first raises", "second raises"],
)
def test_ranks_of_one_command_end_together(
    two_stages: Path, tmp_path: Path, strategy: str, fate: dict[str, str], said: str | tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    code, log = launched(LAUNCHER, two_stages, run, strategy, *fates(**fate))
    assert since_failure(run) < MINUTE
    assert code
    assert any(words in log for words in ([said] if isinstance(said, str) else said)), log[-3000:]


@pytest.mark.slow
def test_torchrun_trains_and_names_the_rank_that_is_killed(two_stages: Path, tmp_path: Path) -> None:
    code, log = launched(TORCHRUN, two_stages, tmp_path / "whole", "fsdp2", "--trainer.callbacks", "[]")
    assert code == 0, log[-3000:]
    run = tmp_path / "run"
    code, log = launched(TORCHRUN, two_stages, run, "fsdp2", *fates(rank1="killed"))
    assert since_failure(run) < MINUTE
    assert code
    assert "Signal 9 (SIGKILL)" in log


def apart_at(rank: int, path: Path) -> list[str]:
    options = ["class_path=failing_ranks.Apart", f"init_args.rank={rank}", f"init_args.path_there={path}"]
    return [f"--data.sources.robot.{option}" for option in options]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_one_rank_cannot_open_end_all_of_them(two_stages: Path, tmp_path: Path, rank: int) -> None:
    code, log = launched(LAUNCHER, two_stages, tmp_path / "run", "ddp", *apart_at(rank, tmp_path / "nowhere"))
    assert code
    assert log.count("nowhere") >= 2  # by both


@pytest.mark.slow
def test_data_that_are_others_to_a_rank_are_refused(two_stages: Path, videos_copy: Path, tmp_path: Path) -> None:
    info = videos_copy / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"splits": {"train": "0:3", "val": "3:5"}}))
    code, log = launched(LAUNCHER, two_stages, tmp_path / "run", "ddp", *apart_at(1, videos_copy))
    assert code
    assert "sees other data than the first rank (data.sources: robot/" in log
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_fewer_validation_samples_than_ranks_are_refused_before_the_first_step(
    two_stages: Path, tmp_path: Path
) -> None:
    validating = [
        "--data.val_samples",
        "1",
        "--trainer.limit_val_batches",
        "1.0",
        "--trainer.num_sanity_val_steps",
        "0",
    ]
    code, log = launched(LAUNCHER, two_stages, tmp_path / "run", "ddp", *validating)
    assert code
    assert "there are 2 ranks, and at most 1 samples of a validation part to look at" in log
    assert not (tmp_path / "run" / "checkpoints").exists()
