"""Where one rank fails the others end soon after, and say which it was and why."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.module.finite import StepNotFinite
from pi05_lightning.training.callbacks.interrupt import Stopped

GRACE = 10.0
"""Seconds that a rank has to fail by itself, with a traceback, once another one has failed."""
LISTEN = 3.0
"""Seconds for which a rank that lost its connection waits to hear why; Lightning kills what is left after 5."""
GONE = "rank 0 is gone: its own output says why, unless it was killed"
_runs = itertools.count()


class EndTogether(Callback):
    """Tells the other ranks why this one fails, through the store by which they found each other, and ends with them.

    A rank that fails breaks the others' connections only once its process is gone, and does not reach those that wait
    for something else. So each listens: to what another says of its failure, and whether the first rank, which keeps
    the store, is there. A rank that is killed says nothing: the others lose their connections to it, and its launcher
    ends them (Lightning on one machine, torchrun, `srun --kill-on-bad-exit`).
    """

    def __init__(self) -> None:
        self._listener: Listener | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size > 1 and environment is not None:
            address = environment.main_address, environment.main_port
            self._listener = Listener(*address, trainer.global_rank, trainer.world_size)
            self._listener.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._listener is not None:
            trainer.strategy.barrier()  # the first rank, with its store, is there until all are done
            self._listener.stop()
            self._listener = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._listener is None:
            return
        self._listener.stop()
        if isinstance(exception, Stopped | StepNotFinite):
            return  # all ranks have it, and save
        started = getattr(trainer.strategy.launcher, "procs", ())
        if lost_connection(exception):
            exception.add_note(self._listener.others(started))
        else:
            self._listener.tell(f"{type(exception).__name__}: {exception}")


class Listener(threading.Thread):
    """Waits at the store at `host:port`, by a connection of its own, for what another rank says of its failure."""

    def __init__(self, host: str, port: int, rank: int, ranks: int) -> None:
        super().__init__(daemon=True, name="end-together")
        self.address, self.rank = (host, port), rank
        self._others = [other for other in range(ranks) if other != rank]
        # the same on all ranks, which have the same runs; torchrun's store outlives those that it restarts
        self._prefix = f"end_together/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_runs)}"
        self._store = self._connect()
        self._stopped = threading.Event()
        self._heard: list[str] = []

    def _connect(self) -> dist.Store:
        store = dist.TCPStore(*self.address, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(self._prefix, store)

    def run(self) -> None:
        """End the process where another rank failed and this one does not end by itself."""
        reason = self._wait()
        if not self._stopped.wait(GRACE):
            print(f"rank {self.rank} ends: {reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def _wait(self) -> str:
        while self._first_rank_is_there():  # a connection may be lost without a rank
            try:
                store = self._connect()
                store.wait([f"wake/{self.rank}"], timedelta(days=365))
                self._heard = self._reasons(store)
                return "; ".join(self._heard)
            except dist.DistError:
                continue
        return GONE

    def _first_rank_is_there(self) -> bool:
        try:
            socket.create_connection(self.address, timeout=GRACE).close()
        except OSError:
            return False
        return True

    def _reasons(self, store: dist.Store) -> list[str]:
        """What the others said."""
        keys = [f"reason/{rank}" for rank in self._others]
        return [store.get(key).decode() for key in keys if store.check([key])]

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
        self._wake([self.rank])
        self.join(GRACE)

    def tell(self, reason: str) -> None:
        """Let the others know why this rank fails."""
        try:
            self._store.set(f"reason/{self.rank}", f"rank {self.rank} failed: {reason}")
        except dist.DistError:
            return  # the first rank is gone
        self._wake(self._others)

    def _wake(self, ranks: Iterable[int]) -> None:
        try:
            for rank in ranks:
                self._store.set(f"wake/{rank}", "")
        except dist.DistError:
            pass  # the first rank is gone, which wakes them too

    def others(self, started: Iterable[subprocess.Popen[bytes]]) -> str:
        """What is known of the rank whose loss broke this one's connections.

        started: the processes of the ranks after this one, where it started them.
        """
        if self._heard:
            return "; ".join(self._heard)
        end = time.monotonic() + LISTEN
        while time.monotonic() < end:
            for rank, process in enumerate(started, self.rank + 1):
                if (code := process.poll()) is not None and code < 0:
                    return f"rank {rank} was killed by {signal.Signals(-code).name}"
            try:
                self._store.set(f"waiting/{self.rank}", "")
                if reasons := self._reasons(self._store):
                    return "; ".join(reasons)
                silent = [str(rank) for rank in self._others if not self._store.check([f"waiting/{rank}"])]
            except dist.DistError:
                return GONE
            time.sleep(0.1)
        return f"rank {', '.join(silent) or '?'} was killed or hangs: it does not answer, nor say why"


def lost_connection(exception: BaseException) -> bool:
    """Whether an exception says nothing but that another rank did not answer."""
    return isinstance(exception, dist.DistError) or "/gloo/" in str(exception)
