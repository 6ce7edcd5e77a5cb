"""Ten thousand requests of 32 clients, some of them killed, beside malformed messages: nobody else notices."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from pi05_lightning import Pi05Policy
from pi05_lightning.serving.reader import Reader
from tests.serving.inside import MESSAGE
from tests.serving.processes import PATIENCE, Process, served_by_process
from tests.serving.robots import observation

PROCESSES, ROBOTS, REQUESTS = 3, 8, 420  # well-behaved; and as many robots in a process that is killed again and again
MALFORMED, MALFORMED_FRAMES = 600, 100
MOST_GROWTH = 32 * 2**20  # bytes of memory


def mutated(seed: int) -> bytes:
    """A message that was valid before some of its bytes were changed, left out, repeated or made up."""
    rng, data = random.Random(seed), bytearray(MESSAGE)
    for _ in range(rng.randint(1, 4)):
        # most of it is pixels, and what matters are the headers around them
        place = rng.choice(
            (rng.randrange(len(data) + 1), rng.randrange(64), rng.randrange(max(1, len(data) - 200), len(data) + 1))
        )
        length = rng.randint(1, 8)
        match rng.randrange(5):
            case 0:
                data[place : place + length] = rng.randbytes(length)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = rng.randbytes(length)
            case 3:
                data[place:place] = rng.choice((b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")) + rng.randbytes(4)
            case _:
                data = data[: place + 1] or bytearray(b"\x80")
    return bytes(data)


def mutated_frame(seed: int) -> bytes:
    """A websocket frame with a byte of its header changed."""
    rng = random.Random(seed)
    frame = bytearray(Frame(Opcode.BINARY, mutated(seed)[:100]).serialize(mask=True))
    frame[rng.randrange(2)] = rng.randrange(256)
    return bytes(frame)


def fuzz(server: Process, told: list[str | bytes]) -> None:
    """Send malformed messages, each of which is answered or ends its connection, and malformed frames."""
    messages = iter([mutated(seed) for seed in range(MALFORMED)])
    while len(told) < MALFORMED:
        with connect(f"ws://{server.address}", compression=None) as client:
            client.recv(timeout=PATIENCE)
            try:
                for message in messages:
                    client.send(message)
                    told.append(client.recv(timeout=PATIENCE))
            except ConnectionClosed as closed:
                told.append(str(closed))
    for seed in range(MALFORMED_FRAMES):
        with connect(f"ws://{server.address}", compression=None, close_timeout=0.1) as client:
            client.recv(timeout=PATIENCE)
            client.socket.sendall(mutated_frame(seed))


def robots(server: Process, expected: Path, first: int, requests: int) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("robots.py")
    command = [sys.executable, str(script), server.address, str(expected), str(first), str(ROBOTS), str(requests)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_again_and_again(server: Process, expected: Path, stop: threading.Event, killed: list[int]) -> None:
    """Robots that are killed while they ask, and others in their place."""
    while not stop.is_set():
        process = robots(server, expected, PROCESSES * ROBOTS, 10**6)
        stop.wait(4)
        process.kill()
        process.wait()
        killed.append(process.pid)


def metrics(server: Process) -> dict[str, float]:
    """By name; with labels, the sum of their numbers."""
    with urlopen(f"http://{server.address}/metrics", timeout=PATIENCE) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    named = sorted((s.name, s.value) for family in families for s in family.samples)
    return {name: sum(value for _, value in group) for name, group in itertools.groupby(named, key=lambda s: s[0])}


def memory(server: Process) -> float:
    return metrics(server)["process_resident_memory_bytes"]


@pytest.fixture
def expected(served: Path, tmp_path: Path) -> Path:
    """The file with each robot's right actions: those that it gets alone."""
    policy = Pi05Policy(served, hierarchical=False, num_steps=2)
    read = Reader(policy.processor.cameras, {}, None)
    numbers = range((PROCESSES + 1) * ROBOTS)
    chunks = [policy.session(0).predict_chunk(read(observation(number))) for number in numbers]
    np.save(tmp_path / "expected.npy", np.stack([chunk[: policy.execution_horizon] for chunk in chunks]))
    return tmp_path / "expected.npy"


@pytest.mark.slow
def test_soak(served: Path, expected: Path) -> None:
    with served_by_process(served, "--hierarchical=false", "--num_steps=2", "--client_timeout=60") as server:
        start, sizes = time.monotonic(), list[float]()
        good = [robots(server, expected, first * ROBOTS, REQUESTS) for first in range(PROCESSES)]
        stop, killed, told = threading.Event(), list[int](), list[str | bytes]()
        others = [
            threading.Thread(target=kill_again_and_again, args=(server, expected, stop, killed)),
            threading.Thread(target=fuzz, args=(server, told)),
        ]
        for thread in others:
            thread.start()
        while any(process.poll() is None for process in good):
            if metrics(server)["pi05_requests_total"] > 1000:  # warm
                sizes.append(memory(server))
            time.sleep(0.5)
        seconds = time.monotonic() - start
        others[1].join()
        stop.set()
        others[0].join()
        for process in good:
            assert process.wait() == 0
            assert process.stdout is not None
            assert process.stdout.read().split() == [str(ROBOTS * REQUESTS), "0"]
        deadline = time.monotonic() + PATIENCE
        while metrics(server)["pi05_clients"]:  # those that were killed are gone
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found = metrics(server)
        sizes.append(memory(server))
        warm, most, end = (size / 2**20 for size in (sizes[0], max(sizes), sizes[-1]))
        print(
            f"{found['pi05_requests_total']:.0f} requests in {seconds:.0f} s, {len(killed)} processes of {ROBOTS}"
            f" clients killed, {found['pi05_failures_total']:.0f} failures counted: memory {warm:.0f} MiB when warm,"
            f" {most:.0f} at most, {end:.0f} in the end"
        )
        assert found["pi05_requests_total"] >= 10_000
        assert found["pi05_pending"] == found["pi05_queue_length"] == 0
        assert len(killed) >= 3
        assert len(told) == MALFORMED
        assert sum(isinstance(answer, str) for answer in told) > MALFORMED / 2
        assert max(sizes) - sizes[0] < MOST_GROWTH
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
