"""A signal ends a run after the step under way: saved, with its status, and resumed as if it had not come."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from killable_fit import (
    KILL_LOADER_AT_BATCH,
    KILL_LOADER_AT_FILE_EVENT,
    SIGNAL_AT_BATCH,
    SIGNAL_AT_START,
    SIGNAL_IN_VALIDATION,
    TO_ALL,
    digest,
    fit,
)
from two_stages import ACCUMULATE

OPENING = 2  # the file event that is the first checkpoint's
INSIDE = 2 * ACCUMULATE  # the first batch of step 2: its gradients wait for the second


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_inside_an_accumulated_step_saves_that_step_and_the_run_ends_as_the_whole(
    config: Path, whole: Any, tmp_path: Path, signum: signal.Signals, ranks: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    start = ["-c", str(config), "--run", str(run), "--data.num_workers", "0", "--checkpoint.every_n_train_steps", "100"]
    codes = fit(start, log, ranks, **{SIGNAL_AT_BATCH: INSIDE, "SIGNAL": signum})
    assert codes == [128 + signum] * ranks, log.read_text()
    assert state(run)["global_step"] == 3
    codes = fit(["--ckpt_path", str(run)], log, ranks)
    assert codes == [0] * ranks, log.read_text()
    for part in ("global_step", "state_dict", "optimizer_states"):
        assert digest(state(run)[part]) == digest(state(whole(ranks))[part]), part


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_of_a_run_leaves_its_loaders_at_work_until_it_is_saved(
    config: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    start = ["-c", str(config), "--run", str(run), "--data.num_workers", "2", "--checkpoint.every_n_train_steps", "100"]
    codes = fit(start, log, **{SIGNAL_AT_BATCH: INSIDE, "SIGNAL": int(signum), TO_ALL: True})
    assert codes == [128 + signum], log.read_text()
    assert state(run)["global_step"] == 3
    assert log.read_text().count("saving after this step") == 1
    assert "Traceback" not in log.read_text()


def test_sigterm_ends_a_measurement_with_its_status_and_without_a_result(
    config: Path, whole: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    args = ["--ckpt_path", str(whole(1)), "--trainer.limit_val_batches", "1.0", "--run", str(tmp_path / "run")]
    assert fit(args, log, command="validate", **{SIGNAL_IN_VALIDATION: 0, "SIGNAL": signal.SIGTERM}) == [
        128 + signal.SIGTERM
    ], log.read_text()
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize("when", [{KILL_LOADER_AT_BATCH: INSIDE}, {KILL_LOADER_AT_FILE_EVENT: OPENING}])
def test_a_loader_that_is_killed_is_told_in_words_and_the_run_goes_on_from_the_last_whole_step(
    config: Path, whole: Any, tmp_path: Path, when: dict[str, int]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    start = ["-c", str(config), "--run", str(run), "--data.num_workers", "2"]
    assert fit(start, log, **when) == [1]
    assert "a process that loads data was killed" in log.read_text()
    assert "could not be written" not in log.read_text()
    assert "Traceback" not in log.read_text()
    assert fit(["--ckpt_path", str(run)], log) == [0], log.read_text()
    assert digest(state(run)["state_dict"]) == digest(state(whole(1))["state_dict"])


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a SLURM job, whose requeueing is written to `requeued`."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }


@pytest.mark.slow
def test_slurms_signal_saves_requeues_and_the_same_command_goes_on(
    config: Path, whole: Any, tmp_path: Path, slurm: dict[str, str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["-c", str(config), "--run", str(run), "--data.num_workers", "0", "--resume", "auto"]
    codes = fit(command, log, **slurm, **{SIGNAL_AT_BATCH: INSIDE, "SIGNAL": signal.SIGUSR1})
    assert codes == [128 + signal.SIGUSR1], log.read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert state(run)["global_step"] == 3
    assert fit(command, log, **slurm) == [0], log.read_text()
    assert digest(state(run)["state_dict"]) == digest(state(whole(1))["state_dict"])


@pytest.mark.slow
def test_no_rank_ends_before_the_job_is_requeued(config: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    scontrol = tmp_path / "bin" / "scontrol"  # where srun ends the rank that started it, it is gone too
    scontrol.write_text(f'#!/bin/sh\nsleep 5\nkill -0 $PPID && echo "$@" >> {tmp_path}/requeued\n')
    ranks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    start = ["-c", str(config), "--run", str(tmp_path / "run"), "--data.num_workers", "0"]
    signalled = {SIGNAL_AT_START: True, "SIGNAL": signal.SIGUSR1}
    codes = fit(start, tmp_path / "log", 2, **slurm | ranks, **signalled)
    assert 128 + signal.SIGUSR1 in codes, (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


@pytest.mark.slow
def test_signal_while_a_run_starts_ends_it_before_its_first_step_and_the_same_command_starts_it_again(
    config: Path, whole: Any, tmp_path: Path, slurm: dict[str, str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["-c", str(config), "--run", str(run), "--data.num_workers", "0", "--resume", "auto"]
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        codes = fit(command, log, **slurm, **{SIGNAL_AT_START: True, "SIGNAL": signum})
        assert codes == [128 + signum], log.read_text()
        assert (tmp_path / "requeued").exists() == (signum == signal.SIGUSR1)
        assert not list(run.rglob("*.ckpt")), "saved by the trainer's own handler"
    assert fit(command, log, **slurm) == [0], log.read_text()
    assert digest(state(run)["state_dict"]) == digest(state(whole(1))["state_dict"])
