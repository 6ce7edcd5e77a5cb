"""`pi05 fit` as processes of its own, which write down what every batch was and are killed where a test wants it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from pi05_lightning.cli.main import main
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.checkpoint_io import AtomicCheckpointIO
from pi05_lightning.types import Batch

KILL_AT_BATCH, KILL_AT_FILE_EVENT, SIGNAL_AT_BATCH = "KILL_AT_BATCH", "KILL_AT_FILE_EVENT", "SIGNAL_AT_BATCH"
KILL_LOADER_AT_BATCH, KILL_LOADER_AT_FILE_EVENT = "KILL_LOADER_AT_BATCH", "KILL_LOADER_AT_FILE_EVENT"
SIGNAL_IN_VALIDATION, SIGNAL_AT_START = "SIGNAL_IN_VALIDATION", "SIGNAL_AT_START"
"""After so many optimizer steps; the signal is SIGNAL, as for SIGNAL_AT_BATCH."""
TO_ALL = "TO_ALL"
"""SIGNAL_AT_BATCH reaches the loader's processes too, as a signal to a job does."""
PATIENCE = 500  # seconds
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.symlink")


def digest(value: Any) -> str:
    """Of every bit of a tensor, and of all tensors in containers and batches."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, DTensor):
            add(value.to_local())  # each rank its own
        elif isinstance(value, Tensor):
            found.update(f"{value.dtype}{list(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Batch):
            add({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, dict):
            for key, item in value.items():
                found.update(str(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()[:16]


class Record(Callback):
    """A line per batch in rank<N>.jsonl; then the kill, after the batch and before what else is done at its end."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if SIGNAL_AT_START in os.environ:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        line = {
            "batch": batch_idx,
            "step": trainer.global_step,
            "keys": batch.key.tolist(),
            "targets": sum(map(len, batch.target_index.values())),
            "pixels": digest(batch.pixels),
            "noise": digest([batch.noise, batch.time]),
            "everything": digest(batch),
            "loss": float(outputs["loss"]).hex(),
            "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "weights": digest(pl_module.state_dict()),
            "average": digest(
                [callback.average for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
            ),
        }
        with Path(trainer.default_root_dir, f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if str(batch_idx) == os.environ.get(KILL_AT_BATCH):
            os.kill(os.getpid(), signal.SIGKILL)
        if str(batch_idx) == os.environ.get(KILL_LOADER_AT_BATCH):
            _kill_loader()
        if str(batch_idx) == os.environ.get(SIGNAL_AT_BATCH) and trainer.global_rank == trainer.world_size - 1:
            loaders = multiprocessing.active_children() if TO_ALL in os.environ else []
            assert loaders or TO_ALL not in os.environ
            pids = [str(process.pid) for process in loaders] + [str(os.getpid())]
            subprocess.run(["kill", f"-{os.environ['SIGNAL']}", *pids], check=True)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking and str(trainer.global_step) == os.environ.get(SIGNAL_IN_VALIDATION):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))


def _kill_loader() -> None:
    """One of the loader's processes; this process hears of it before anything else is done."""
    pid = multiprocessing.active_children()[0].pid or 0
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _at_file_event(number: int, do: Callable[[], None]) -> None:
    """Before the n-th time that a file under checkpoints/ is opened for writing, renamed, removed or linked."""
    seen = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and "/checkpoints/" in str(args[:2]) and not (event == "open" and args[1] == "rb"):
            seen += 1
            if seen == number:
                do()

    sys.addaudithook(count)


def _fit(args: list[str], environment: dict[str, str], log: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as `pi05 fit` starts its loader's processes
    os.environ |= environment
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if KILL_AT_FILE_EVENT in environment:
        _at_file_event(int(environment[KILL_AT_FILE_EVENT]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if KILL_LOADER_AT_FILE_EVENT in environment:
        _at_file_event(int(environment[KILL_LOADER_AT_FILE_EVENT]), _kill_loader)
    main(args)


def _save(path: Path, values: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"values": torch.zeros(values)}, path)


def start_saving(path: Path, values: int) -> Any:
    """A process that writes a checkpoint of so many numbers."""
    process = server().Process(target=_save, args=(path, values))
    process.start()
    return process


def server() -> Any:
    """What all processes fork from, so that none has to import anything."""
    context = multiprocessing.get_context("forkserver")
    # by names that are found from anywhere: this file is not on the path of the process that all fork from, which says
    # nothing of what it could not import
    context.set_forkserver_preload(["torch._dynamo", "pi05_lightning.cli.run", "pi05_lightning.data.sources.lerobot"])
    return context


def fit(
    args: list[str],
    log: Path,
    ranks: int = 1,
    strategy: str = "ddp",
    command: str = "fit",
    each: Sequence[Sequence[str]] = (),
    kill_others: bool = True,
    **environment: int | str,
) -> list[int | None]:
    """Exit codes of the ranks; when one ends badly the others are killed, as a scheduler would, or are not.

    each: of every rank, the arguments that it alone has.
    """
    common = {name: str(int(value)) if isinstance(value, int) else value for name, value in environment.items()}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        args = [*args, "--trainer.devices", str(ranks), "--trainer.strategy", strategy]
    processes = []
    for rank in range(ranks):
        places = ("LOCAL_RANK", "SLURM_LOCALID", "SLURM_PROCID") if ranks > 1 else ()
        own = common | dict.fromkeys(places, str(rank))
        processes.append(
            server().Process(target=_fit, args=([command, *args, *(each[rank] if each else ())], own, log))
        )
        processes[-1].start()
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], PATIENCE)
        running = [process for process in running if process.sentinel not in ended]
        for process in processes:
            if process not in running:
                process.join()
        is_bad = any(process.exitcode for process in processes if process not in running)
        if not ended or (kill_others and is_bad):
            for process in running:
                process.kill()
        if not ended:
            raise TimeoutError(f"no rank ended within {PATIENCE} s: {log.read_text()}")
    return [process.exitcode for process in processes]


def lines(run: Path, rank: int) -> dict[int, list[dict[str, Any]]]:
    """What a rank wrote about each batch; more than once where a killed run had to do it again."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in (run / f"rank{rank}.jsonl").read_text().splitlines():
        content = json.loads(line)
        found.setdefault(content["batch"], []).append(content)
    return found
