"""A server that is told to stop answers what it was asked, says goodbye and exits with 0, within a bound."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.serving.inside import MESSAGE
from tests.serving.processes import PATIENCE, Process, served_by_process

TOKEN = "correct-horse"
HEADERS = {"Authorization": f"Api-Key {TOKEN}"}
SLOW = "--num_steps=300"  # a request takes a fifth of a second
MANY = 60

ClientOf = Callable[[Process], ClientConnection]


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Connects openpi's client to a server, and reads the metadata."""
    with ExitStack() as connections:

        def connected(server: Process) -> ClientConnection:
            link = connect(f"ws://{server.address}", additional_headers=HEADERS, compression=None)
            client = connections.enter_context(link)
            client.recv(timeout=PATIENCE)
            return client

        yield connected


def ask(client: ClientConnection, server: Process, times: int) -> None:
    """Requests that the server has read when this returns."""
    for _ in range(times):
        client.send(MESSAGE)
    deadline = time.monotonic() + PATIENCE
    while number(server, "pi05_pending") + number(server, "pi05_requests_total") < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def number(server: Process, name: str) -> float:
    """One of its metrics."""
    with urlopen(Request(f"http://{server.address}/metrics", headers=HEADERS), timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def goodbye(client: ClientConnection) -> tuple[int, int | None, str | None]:
    """How many answers still come, and the code and reason with which the server closes then."""
    answers = 0
    while True:
        try:
            assert isinstance(client.recv(timeout=PATIENCE), bytes)
            answers += 1
        except ConnectionClosed:
            return answers, client.close_code, client.close_reason


def unfinished_request(server: Process) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    link = socket.create_connection((host, int(port)))
    link.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow:")
    return link


def seconds_to_the_end_of(link: socket.socket) -> float:
    """While a byte more of the request comes every 50 ms."""
    start = time.monotonic()
    link.settimeout(0.05)
    while time.monotonic() - start < PATIENCE:
        try:
            with suppress(TimeoutError):
                if not link.recv(1):
                    break
            link.sendall(b"x")
        except ConnectionError:
            break
    return time.monotonic() - start


@pytest.mark.slow
def test_server_on_a_network_drains_when_it_is_terminated(served: Path, client_of: ClientOf) -> None:
    options = ["--host=0.0.0.0", "--client_timeout=1", SLOW]
    with served_by_process(served, *options, PI05_TOKEN=TOKEN) as server:
        assert seconds_to_the_end_of(unfinished_request(server)) < PATIENCE
        assert (server.status("healthz"), server.status("readyz"), server.status("metrics")) == (200, 200, 401)
        idle, busy = client_of(server), client_of(server)
        ask(busy, server, times=3)
        server.process.send_signal(signal.SIGTERM)
        assert goodbye(idle) == (0, 1001, "the server stops")
        assert (server.status("healthz"), server.status("readyz")) == (200, 503)
        with pytest.raises(ConnectionClosed, match=r"1013 .* the server stops"):
            client_of(server)
        assert goodbye(busy) == (3, 1001, "the server stops")
        assert server.process.wait(PATIENCE) == 0
        assert TOKEN not in server.log


@pytest.mark.slow
def test_policy_that_computes_on_is_left_after_the_time_to_drain(served: Path, client_of: ClientOf) -> None:
    with served_by_process(served, "--drain_timeout=0.5", SLOW) as server:
        client = client_of(server)
        ask(client, server, times=MANY)
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
        assert 0.5 <= time.monotonic() - start < 10
        answers, code, _ = goodbye(client)
        assert answers < MANY
        assert code == 1001
        assert "stopped after 0.5 s (--drain_timeout), before all was answered" in server.log


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(served: Path, client_of: ClientOf, kind: signal.Signals) -> None:
    with served_by_process(served, "--drain_timeout=600", SLOW) as server:
        ask(client_of(server), server, times=MANY)
        server.process.send_signal(kind)
        deadline = time.monotonic() + PATIENCE
        while "a second signal ends it" not in server.log:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        start = time.monotonic()
        server.process.send_signal(kind)
        assert server.process.wait(PATIENCE) == -kind
        assert time.monotonic() - start < 2
