"""Processes that simulate, when one of them is killed."""

from __future__ import annotations

import os
import signal

import pytest

from pi05_lightning.sim.processes import simulator_processes


def test_process_that_was_killed_is_an_error_that_says_what_to_do():
    killed = pytest.raises(ChildProcessError, match="want of memory: use fewer with --num_workers")
    with killed, simulator_processes(1, os.getpid) as pool:
        os.kill(pool.submit(os.getpid).result(), signal.SIGKILL)
        pool.submit(os.getpid).result()
