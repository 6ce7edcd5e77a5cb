"""Clients that are slow, gone or too many while others are answered, and pings that are while the policy computes."""

from __future__ import annotations

import asyncio
import base64
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from pi05_lightning import Pi05Policy
from pi05_lightning.serving.connection import MAX_WAITING
from pi05_lightning.serving.limits import Limits
from pi05_lightning.serving.wire import pack, unpack
from tests.serving.inside import MESSAGE, OBSERVATION, count, served_inside, until

STEPS = 600
PATIENT = Limits(client_timeout=0.5)


@pytest.fixture(scope="module")
def slow(served: Path) -> Pi05Policy:
    """A policy that computes for seconds."""
    return Pi05Policy(served, num_steps=STEPS)


async def greeted(address: str, **options: Any) -> ClientConnection:
    client = await connect(f"ws://{address}", **options)
    await client.recv()
    return client


def test_pings_are_answered_while_the_policy_computes(slow: Pi05Policy) -> None:
    async def ask() -> tuple[int, int]:
        async with served_inside(slow) as (_, address):
            client = await greeted(address)
            await client.send(MESSAGE)
            answer, before = asyncio.create_task(client.recv()), 0
            while not answer.done():
                await (await client.ping())
                before += not answer.done()
                await asyncio.sleep(0.01)
            await client.close()
            return before, len(unpack(await answer)["actions"])

    before, actions = asyncio.run(ask())
    assert before >= 3
    assert actions == 1


@pytest.mark.slow
def test_answer_that_takes_long_breaks_no_keepalive(served: Path) -> None:
    async def ask() -> float:
        loop = asyncio.get_running_loop()
        async with served_inside(Pi05Policy(served, num_steps=20_000)) as (_, address):
            client = await greeted(address, ping_interval=2, ping_timeout=2)
            start = loop.time()
            await client.send(MESSAGE)
            await client.recv()
            await client.close()
            return loop.time() - start

    assert asyncio.run(ask()) > 8


def test_requests_of_one_client_are_answered_in_their_order(policy: Pi05Policy) -> None:
    bad = pack({**OBSERVATION, "observation/state": np.zeros(9)})

    async def ask() -> list[str | bytes]:
        async with served_inside(policy) as (_, address):
            client = await greeted(address)
            for message in (MESSAGE, bad, "text", MESSAGE, b"\xc1", MESSAGE):
                await client.send(message)
            answers = [await client.recv() for _ in range(6)]
            await client.close()
            return answers

    answers = asyncio.run(ask())
    assert [isinstance(answer, bytes) for answer in answers] == [True, False, False, True, False, True]
    assert "state has 9" in str(answers[1])
    assert "not text" in str(answers[2])
    assert "not msgpack" in str(answers[4])


def test_client_that_sends_faster_than_it_is_answered_is_told_so(slow: Pi05Policy) -> None:
    more = 3

    async def ask() -> tuple[list[str | bytes], float]:
        async with served_inside(slow) as (server, address):
            client = await greeted(address)
            await client.send(MESSAGE)
            for _ in range(MAX_WAITING + more):
                await client.send(b"")  # which is quick to answer
            answers = [await client.recv() for _ in range(1 + MAX_WAITING + more)]
            await client.close()
            return answers, count(server, "pi05_failures_total", kind="queue")

    answers, counted = asyncio.run(ask())
    assert 1 <= counted <= more + 1  # whether the first waited yet when the others came
    refused = [answer for answer in answers if "wait already" in str(answer)]
    assert len(refused) == counted
    assert answers[-1] in refused


@pytest.mark.slow
def test_client_that_sends_much_faster_than_it_is_answered_is_held_back_and_not_ended(slow: Pi05Policy) -> None:
    async def ask() -> tuple[int, float]:
        async with served_inside(slow, limits=PATIENT) as (server, address):
            client = await greeted(address)
            await client.send(MESSAGE)
            sending = asyncio.create_task(asyncio.wait_for(send_all(client), 60))
            answers = [await client.recv() for _ in range(1 + 8 * MAX_WAITING)]
            await sending
            await client.close()
            return len(answers), count(server, "pi05_failures_total", kind="slow")

    async def send_all(client: ClientConnection) -> None:
        for number in range(8 * MAX_WAITING):
            await client.send(MESSAGE if number % MAX_WAITING == 0 else b"")

    assert asyncio.run(ask()) == (1 + 8 * MAX_WAITING, 0)


def test_one_more_client_than_may_be_is_told_so(policy: Pi05Policy) -> None:
    async def ask() -> tuple[ConnectionClosed, float, float]:
        async with served_inside(policy, limits=Limits(max_clients=2)) as (server, address):
            first, second = await greeted(address), await greeted(address)
            with pytest.raises(ConnectionClosed) as refused:
                await greeted(address)
            most = count(server, "pi05_clients")
            await first.close()
            await until(lambda: count(server, "pi05_clients") == 1)
            third = await greeted(address)
            for client in (second, third):
                await client.send(MESSAGE)
                assert isinstance(await client.recv(), bytes)
                await client.close()
            return refused.value, most, count(server, "pi05_failures_total", kind="clients")

    refused, most, counted = asyncio.run(ask())
    assert refused.rcvd is not None
    assert (refused.rcvd.code, refused.rcvd.reason) == (1013, "2 clients are connected: raise --max_clients")
    assert (most, counted) == (2, 1)


@pytest.mark.parametrize("way", ["close", "abort"])
def test_client_that_leaves_is_noticed_while_its_request_is_computed(slow: Pi05Policy, way: str) -> None:
    async def ask() -> None:
        async with served_inside(slow) as (server, address):
            client, other = await greeted(address), await greeted(address)
            await client.send(MESSAGE)
            await other.send(MESSAGE)
            answer = asyncio.create_task(other.recv())
            await until(lambda: count(server, "pi05_pending") == 2)
            if way == "abort":
                client.transport.abort()
            else:
                await client.close()
            await until(lambda: count(server, "pi05_clients") == 1)
            assert not answer.done()
            assert count(server, "pi05_failures_total", kind="left") == 1
            assert isinstance(await answer, bytes)
            await other.close()

    asyncio.run(ask())


class Raw:
    """A websocket client of bytes, that does nothing by itself: no pongs, no closing."""

    def __init__(self, address: str, receive_buffer: int | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((host, int(port)))
        self.socket.setblocking(False)
        self.address = address

    async def greet(self) -> None:
        loop = asyncio.get_running_loop()
        head = f"GET / HTTP/1.1\r\nHost: {self.address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
        await loop.sock_sendall(self.socket, (head + key).encode())
        assert b" 101 " in await loop.sock_recv(self.socket, 4096)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def seconds_to_its_end(self, send: bytes = b"", most: float = 30.0) -> float:
        """Until the server ends the connection, while a byte of `send` goes out every 20 ms."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        reading = asyncio.create_task(self._until_end())
        for byte in send:
            if reading.done() or loop.time() - start > most:
                break
            try:
                await self.send(bytes([byte]))
            except ConnectionError:
                break
            await asyncio.wait([reading], timeout=0.02)
        async with asyncio.timeout(most):
            await reading
        return loop.time() - start

    async def _until_end(self) -> None:
        try:
            while await asyncio.get_running_loop().sock_recv(self.socket, 65536):
                pass
        except ConnectionError:
            pass


def frame(data: bytes, opcode: Opcode = Opcode.BINARY, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=True)


@pytest.mark.parametrize("sent", ["nothing", "a frame byte by byte", "fragments without end"])
def test_client_that_answers_no_ping_is_ended_and_others_are_not(policy: Pi05Policy, sent: str) -> None:
    """Half-open, it looks like the first."""
    data = {
        "nothing": b"",
        "a frame byte by byte": frame(bytes(10_000)),
        "fragments without end": frame(b"", fin=False) + frame(b"", Opcode.CONT, fin=False) * 1000,
    }[sent]

    async def ask() -> float:
        async with served_inside(policy, limits=PATIENT) as (server, address):
            other, raw = await greeted(address), Raw(address)
            await raw.greet()
            seconds = await raw.seconds_to_its_end(data)
            assert count(server, "pi05_failures_total", kind="slow") == 1
            await other.send(MESSAGE)
            assert isinstance(await other.recv(), bytes)
            await other.close()
            return seconds

    assert asyncio.run(ask()) >= 0.4


def test_client_that_reads_no_answers_is_ended(policy: Pi05Policy) -> None:
    async def ask() -> None:
        async with served_inside(policy, limits=PATIENT) as (server, address):
            raw = Raw(address, receive_buffer=4096)
            await raw.greet()

            async def flood() -> None:
                while True:
                    await raw.send(frame(b"\xc1") * 1000)

            flooding = asyncio.create_task(flood())
            await until(lambda: count(server, "pi05_failures_total", kind="slow") == 1)
            await until(lambda: count(server, "pi05_clients") == 0)
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)

    asyncio.run(ask())


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x05hello",  # not masked is let through by aiohttp; five bytes that are no msgpack
        frame(b"x" * 10)[:1] + b"\xff" * 9,
        b"\xf2" + frame(b"x")[1:],
        b"\x8b" + frame(b"x")[1:],
        frame(b"", Opcode.CONT),
        b"\x88\x81\0\0\0\0x",
        b"\x09" + frame(b"x")[1:],
        frame(b"\xff", Opcode.TEXT),
    ],
    ids=[  # masks are random, and workers have to find the same tests
        "no msgpack",
        "a length of 2^64 - 1",
        "reserved bits",
        "an unknown opcode",
        "goes on from nothing",
        "a close code of one byte",
        "a ping in fragments",
        "text that is no UTF-8",
    ],
)
def test_what_is_no_websocket_ends_its_connection_alone(policy: Pi05Policy, data: bytes) -> None:
    async def ask() -> None:
        async with served_inside(policy) as (server, address):
            other, raw = await greeted(address), Raw(address)
            await raw.greet()
            await raw.send(data)
            await until(
                lambda: (
                    count(server, "pi05_failures_total", kind="protocol")
                    + count(server, "pi05_failures_total", kind="observation")
                    == 1
                )
            )
            raw.socket.close()
            await until(lambda: count(server, "pi05_clients") == 1)
            await other.send(MESSAGE)
            assert isinstance(await other.recv(), bytes)
            await other.close()

    asyncio.run(ask())


def test_client_that_does_not_read_what_the_server_says_of_itself_is_ended(policy: Pi05Policy) -> None:
    async def ask() -> None:
        async with served_inside(policy, limits=Limits(client_timeout=0.5)) as (server, address):
            server.metadata["tasks"] = ["x" * 1000] * 10_000  # more than the buffers of both ends hold
            host, port = address.split(":")
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((host, int(port)))
                key = base64.b64encode(bytes(16)).decode()
                upgrade = f"GET / HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                client.sendall(f"{upgrade}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
                await until(lambda: count(server, "pi05_clients") == 1)
                await until(lambda: count(server, "pi05_clients") == 0)
                assert count(server, "pi05_failures_total", kind="slow") == 1

    asyncio.run(ask())
