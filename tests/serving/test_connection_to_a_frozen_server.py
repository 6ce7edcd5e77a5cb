"""A server that reads nothing more, as of a host that is gone: what is on its way to it is not waited for."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic, sleep

import numpy as np
import pytest

from pi05_lightning.serving.client.connection import Connection, Lost
from pi05_lightning.serving.wire import pack
from tests.serving.counting import CountingServer

SMALL = pack({"observation/state": np.zeros(1)})
LARGE = pack({"observation/state": np.zeros(1), "image": np.zeros(20_000_000, np.uint8)})
"""More than the buffers of both ends hold."""


def connected(connection: Connection) -> None:
    while connection.metadata is None:
        assert connection.news.wait(10), connection.problem
        connection.news.clear()


@pytest.fixture
def frozen() -> Iterator[Connection]:
    """A connection whose server froze after its first answer."""
    server = CountingServer()
    server.say = {0: "freeze"}
    with server.running() as url, Connection(url, answer_timeout=0.5) as connection:
        connected(connection)
        connection.ask(SMALL).result(10)
        yield connection


def test_answer_is_given_up_and_the_connection_made_anew(frozen: Connection) -> None:
    with pytest.raises(Lost, match=r"no answer within 0\.5 s"):
        frozen.ask(LARGE).result(8)
    connected(frozen)
    assert frozen.ask(SMALL).result(10).message["subtask"] == "chunk 1"


def test_connection_is_closed_at_once(frozen: Connection) -> None:
    frozen.ask(LARGE)
    sleep(0.1)  # until it is sent as far as there is room
    start = monotonic()
    frozen.close()
    assert monotonic() - start < 3
