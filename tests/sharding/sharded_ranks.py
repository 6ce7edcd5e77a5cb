"""Functions on several ranks, each a process, over gloo; all fork from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch

PATIENCE = 300  # seconds, after which ranks wait for each other forever


def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    # the first comes with the first DTensor; what lies beside this file is not on the path of what ranks fork from
    context.set_forkserver_preload(
        ["torch._dynamo", "pi05_lightning.data.sources.lerobot", "pi05_lightning.training.callbacks.stages"]
    )
    return context


def _rank(function: Callable[..., Any], number: int, environment: dict[str, str], folder: Path, args: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as `pi05 fit` starts its loader's processes
    os.environ |= environment | {"LOCAL_RANK": str(number)}
    with (folder / f"{number}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    torch.save(function(*args), folder / f"{number}.pt")


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
    """What a function of a module beside this one returns on each rank.

    AssertionError, with what the ranks printed, where one fails or not all end in time.
    """
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "NODE_RANK": "0",
        }
        free.close()
        processes = [
            server().Process(target=_rank, args=(function, rank, environment, Path(folder), args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        end, running = monotonic() + patience, list(processes)
        while running and monotonic() < end and not any(process.exitcode for process in processes):
            wait([process.sentinel for process in running], max(0, end - monotonic()))
            running = [process for process in running if process.exitcode is None]
        for process in running:
            process.kill()
        for process in processes:
            process.join()
        logs = [Path(folder, f"{rank}.log").read_text()[-4000:] for rank in range(ranks)]
        codes = [process.exitcode for process in processes]
        assert codes == [0] * ranks, "\n".join([f"ranks ended with {codes}", *logs])
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]
