"""A server that answers its clients together against the same one answering one at a time, as openpi's does."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch

from benchmarks.harness import Options, Row, run_part, share
from benchmarks.peer import randomize
from benchmarks.sizes import DEBUG, MID
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.robot import Normalize, Quantiles, Robot
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Frame, Modality, Subset
from pi05_lightning.weights.folder import save

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".openpi-client"
"""Where openpi's client is installed, which needs NumPy 1."""
CAMERAS, DIMS = ("topview", "gripperPOV"), 4
SUBTASKS = {
    "close the faucet": "move above the faucet handle",
    "open the drawer": "lower the gripper behind the drawer handle",
    "open the window": "slide the window open",
    "press the button from above": "press the button down",
}
"""Tasks of the demo, each with a subtask that it says there."""
ONE_AT_A_TIME = ("--max_batch", "1")
LESSONS = 40
"""Steps in which the demo's policy learns its subtasks, as texts of random weights have no end."""


@dataclass(frozen=True)
class Served:
    """A policy, and how it is asked: by how many robots, how often each in a run of all of them and in one alone."""

    name: str
    config: ModelConfig
    says_subtasks: bool
    clients: int
    requests: int
    requests_alone: int
    goal: str
    pairs: int


def served(quick: bool) -> list[Served]:
    if quick:
        return [Served("debug", DEBUG, True, 3, 2, 2, ">= 4", 1)]
    demo = replace(ModelConfig.preset("tiny"), vocab_size=4096)
    return [
        Served("the demo's policy", demo, True, 32, 20, 40, ">= 4", 5),
        Served("mid", replace(MID, vocab_size=4096), False, 8, 3, 8, ">= 1", 3),
    ]


def serve(options: Options) -> list[Row]:
    """Requests per second of a fleet of openpi's clients, answered together over one at a time; and latencies."""
    python = client_environment()
    rows: list[Row] = []
    for policy in served(options.quick):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
            make(policy, Path(folder))
            alone, together = (running.enter_context(server(Path(folder), args)) for args in (ONE_AT_A_TIME, ()))
            fleet = running.enter_context(robots(python, policy))
            rows += measure(policy, fleet, alone, together, min(options.pairs, policy.pairs))
    return rows


def measure(policy: Served, fleet: Sequence[Process], alone: int, together: int, pairs: int) -> list[Row]:
    """One fleet asks the two servers in turn."""
    rates: dict[int, list[float]] = {alone: [], together: []}
    tails: tuple[list[float], list[float]] = ([], [])
    single: dict[int, list[float]] = {alone: [], together: []}
    for pair in range(-1, pairs):
        for port in (alone, together) if pair % 2 else (together, alone):
            start = time.perf_counter()
            seconds = ask(fleet, port, policy.requests)
            rate = len(seconds) / (time.perf_counter() - start)
            one = ask(fleet[:1], port, policy.requests_alone)
            if pair < 0:
                continue
            rates[port].append(rate)
            single[port].append(statistics.median(one))
            if port == together:
                tails[0].append(statistics.median(seconds))
                tails[1].append(float(np.quantile(seconds, 0.99)))
    many = f"server, {policy.name}, {policy.clients} clients"
    return [
        share(f"{many}, in batches over one at a time", policy.goal, "requests/s", rates[alone], rates[together]),
        share(f"{many}, in batches: p99 over p50", "<= 3", "s", *tails),
        share(
            f"server, {policy.name}, 1 client, with batches over without: p50",
            "<= 1.05",
            "s",
            single[alone],
            single[together],
        ),
    ]


# --- the clients


Process = subprocess.Popen[str]


def client_environment() -> Path:
    """The Python of an environment with openpi's client, which is made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, ENVIRONMENT], check=True)
        packages = ["openpi-client==0.1.2", "typing_extensions"]
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *packages], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


@contextmanager
def robots(python: Path, policy: Served) -> Iterator[list[Process]]:
    """Processes of openpi's client, one each."""
    size = str(policy.config.vision.image_size)
    command = [str(python), str(HERE / "openpi_robot.py")]
    about = [size, ",".join(CAMERAS), str(DIMS), *SUBTASKS]
    with ExitStack() as running:
        yield [
            running.enter_context(stopped_in_the_end([*command, str(number), *about]))
            for number in range(policy.clients)
        ]


def ask(fleet: Sequence[Process], port: int, requests: int) -> list[float]:
    """The seconds of every request, when all ask so often at the same time."""
    for robot in fleet:
        assert robot.stdin is not None
        robot.stdin.write(f"{port} {requests}\n")
        robot.stdin.flush()
    seconds = []
    for robot in fleet:
        assert robot.stdout is not None
        seconds += json.loads(robot.stdout.readline())
    return seconds


# --- the servers


@contextmanager
def server(folder: Path, options: Sequence[str]) -> Iterator[int]:
    """The port of a server of the policy, as a user starts it."""
    command = [sys.executable, "-m", "pi05_lightning", "serve", str(folder), "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log, stopped_in_the_end(command, log) as process:
        while True:
            log.seek(0)
            if found := [line for line in log if "serving at ws://" in line]:
                yield int(found[0].rpartition(":")[2])
                return
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"the server stopped: {log.read()}")
            time.sleep(0.2)


@contextmanager
def stopped_in_the_end(command: Sequence[str], log: IO[str] | None = None) -> Iterator[Process]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


# --- the policies


def make(policy: Served, folder: Path) -> None:
    """Export a policy of random weights; one with subtasks is taught those of the demo."""
    torch.manual_seed(0)
    ones = np.ones(DIMS, np.float32)
    quantiles = Quantiles(-ones, ones)
    robot = Robot(Normalize(quantiles, quantiles), 10.0, tuple(SUBTASKS), has_subtasks=policy.says_subtasks)
    tokenizer, language = TextTokenizer.load("tiny"), Language(condition_on="both")
    processor = Processor(policy.config.shapes, tokenizer, CAMERAS, {"robot": robot}, language)
    model = Pi05(policy.config)
    randomize(model)
    if policy.says_subtasks:
        model.reset_parameters(processor.tokenizer.ordinal_ids())
        teach(model, processor)
    save(folder, model, processor)


def teach(model: Pi05, processor: Processor) -> None:
    rng = np.random.default_rng(0)
    size = processor.shapes.image_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(LESSONS):
        frames = [
            Frame(
                images={camera: rng.integers(0, 256, (3, size, size), np.uint8) for camera in CAMERAS},
                task=task,
                subtask=subtask,
                state=rng.uniform(-1, 1, DIMS).astype(np.float32),
            )
            for task, subtask in SUBTASKS.items()
        ]
        batch = processor.collate([processor.sample(f, Subset("robot", Modality.HL_SUBTASK)) for f in frames])
        optimizer.zero_grad()
        model(batch, ["subtask"])["subtask"].values.mean().backward()
        optimizer.step()


if __name__ == "__main__":
    run_part(serve)
