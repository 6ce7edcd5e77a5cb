"""What a loader's process does with signals, which SLURM, Ctrl-C and `timeout` send to all processes of a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave_signals_to_the_run(worker: int) -> None:
    """A `worker_init_fn`: a loader's process loads until the run that it loads for has ended the step, and saved.

    SIGTERM ends it where the run itself sends it. Without the run it ends by PyTorch's watchdog.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_where_the_run_says_so, name="pi05-sigterm", daemon=True).start()


def _end_where_the_run_says_so() -> None:
    run = multiprocessing.parent_process()
    assert run is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(0)
