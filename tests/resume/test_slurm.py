"""configs/slurm/train.sh: its one command starts a run, requeues it at SLURM's signal, and goes on with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killable_fit import SIGNAL_AT_BATCH, digest

from .test_signals import INSIDE, state

ROOT = Path(__file__).parents[2]


def program(folder: Path, name: str, lines: str) -> None:
    """A program of this name, first in the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)


@pytest.mark.slow
def test_script_requeues_at_the_signal_and_goes_on_when_it_is_started_again(
    config: Path, whole: Any, tmp_path: Path
) -> None:
    programs, run = tmp_path / "bin", tmp_path / "run"
    program(programs, "scontrol", f'echo "$@" >> {tmp_path}/requeued')
    program(programs, "srun", f'echo "$1 $2" > {tmp_path}/options; shift 2; exec "$@"')
    program(programs, "pi05", f'exec {sys.executable} -m pi05_lightning "$@"')
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "RUN": str(run),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "pi05",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    command = [str(ROOT / "configs/slurm/train.sh"), "-c", str(config), "--data.num_workers", "0"]

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)

    stopped = start(**{SIGNAL_AT_BATCH: str(INSIDE), "SIGNAL": str(int(signal.SIGUSR1))})
    assert stopped.returncode == 128 + signal.SIGUSR1, stopped.stderr[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert (tmp_path / "options").read_text() == "--kill-on-bad-exit=1 --cpus-per-task=6\n"
    assert state(run)["global_step"] == 3
    done = start()
    assert done.returncode == 0, done.stderr[-3000:]
    assert digest(state(run)["state_dict"]) == digest(state(whole(1))["state_dict"])
