"""Messages that hold too much are refused in their raw bytes, with the limit and how to raise it."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from pi05_lightning import Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.serving.limits import LimitError, Limits
from pi05_lightning.serving.wire import pack, unpack
from tests.serving.inside import MESSAGE, OBSERVATION, PICTURE, count, served_inside

SMALL = Limits(max_message_bytes=2000, max_image_bytes=1000, max_values=100, max_prompt_bytes=50)


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        ({"prompt": "x" * 51}, "prompt has 51 bytes, and the server takes 50: .* --max_prompt_bytes"),
        ({"prompt": "ä" * 26}, "prompt has 52 bytes"),
        ({"observation": {"prompt": "x" * 51}}, "observation/prompt has 51 bytes"),
        ({"x" * 51: 1}, "a key has 51 bytes"),
        ("x" * 51, "the message has 51 bytes"),
        ({"a": {"top": np.zeros(1001, np.uint8)}}, "a/top/data has 1001 bytes, .* 1000: .* --max_image_bytes"),
        ({"top": bytes(1001)}, "top has 1001 bytes"),
        ({"state": [0.0] * 98}, "the message has 101 values, .* 100: .* --max_values"),
        ({f"key {i}": 0 for i in range(50)}, "the message has 101 values"),
        ([[0] * 30] * 4, "the message has 125 values"),
        ({"a": bytes(999), "b": bytes(999)}, "the message has 2009 bytes, .* 2000: .* --max_message_bytes"),
    ],
)
def test_message_beyond_a_limit_is_refused_with_the_limit(message: Any, refusal: str) -> None:
    with pytest.raises(LimitError, match=refusal):
        SMALL.check(pack(message))


@pytest.mark.parametrize(
    "message",
    [
        {"prompt": "x" * 50},
        {"prompt": "ä" * 25},
        {"top": np.zeros(1000, np.uint8)},
        {"top": bytes(1000)},
        {"state": [0.0] * 97},
        [[0] * 30] * 3,
        None,
    ],
)
def test_message_at_a_limit_is_read(message: Any) -> None:
    SMALL.check(pack(message))


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def test_depth_is_bounded() -> None:
    Limits().check(nested(16))
    for depth in (17, 1000, 10**6):
        with pytest.raises(LimitError, match="nests deeper than 16"):
            Limits(max_values=10**9).check(nested(depth))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 2^32 - 1
        b"\xdf\xff\xff\xff\xff",  # a dictionary of as many
        b"\xdd\x00\x10\x00\x00" * 1000,  # lists of a million in each other
        b"\x92" * 15 + b"\xdc\xff\xff" * 1000,
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\xdb\xff\xff\xff\xff",  # and of text
        b"\xc9\xff\xff\xff\xff\x01",  # and of an extension
        b"\x81\xa1x\xc6\x7f\xff\xff\xff" + bytes(1000),
        b"\x81\xa1x",
        b"\xc1",
        b"",
    ],
)
def test_headers_that_claim_what_does_not_follow_cost_nothing(bomb: bytes) -> None:
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"server takes|not msgpack|extension type"):
        Limits().check(bomb)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert seconds < 1


@pytest.mark.parametrize(
    "claim",
    [
        {b"shape": [2**40, 2**40]},
        {b"shape": [3]},
        {b"shape": [-2]},
        {b"shape": [-1, -2]},
        {b"shape": [2.0]},
        {b"shape": "ab"},
        {b"shape": 2},
        {b"shape": [1] * 99 + [2]},
        {b"shape": [0, 2**62], b"data": b""},
        {b"dtype": "<U500000000"},
        {b"dtype": "<U0", b"shape": [2**40], b"data": b""},
        {b"dtype": [["a", "<f4"]]},
        {b"dtype": {"names": ["a"], "formats": ["<f4"]}},
        {b"dtype": "<f4," * 1000},
        {b"data": "text"},
    ],
)
def test_array_that_claims_what_it_has_not_is_an_error(claim: dict[bytes, Any]) -> None:
    array = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    assert unpack(msgpack.packb(array)).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"."):
        unpack(msgpack.packb(array | claim))


def test_huge_messages_stop_nobody(policy: Pi05Policy) -> None:
    huge = {
        "max_prompt_bytes": pack({**OBSERVATION, "prompt": "open the drawer " * 2**16 * 10}),
        "max_image_bytes": pack({**OBSERVATION, "observation/top": np.zeros((2400, 2400, 3), np.uint8)}),
        "max_values": pack({**OBSERVATION, "observation/top": PICTURE[:, :, 0].tolist() * 10}),
    }

    async def ask() -> tuple[list[str], list[float], float]:
        async with served_inside(policy) as (server, address):
            async with connect(f"ws://{address}") as hostile, connect(f"ws://{address}") as other:
                await asyncio.gather(hostile.recv(), other.recv())
                told, waited = [], []
                for message in huge.values():
                    await hostile.send(message)
                    refused = asyncio.create_task(hostile.recv())
                    while not refused.done():
                        start = time.perf_counter()
                        await other.send(MESSAGE)
                        assert isinstance(await other.recv(), bytes)
                        waited.append(time.perf_counter() - start)
                    told.append(await refused)
                await hostile.send(MESSAGE)
                assert isinstance(await hostile.recv(), bytes)
            return told, waited, count(server, "pi05_failures_total", kind="limit")

    told, waited, counted = asyncio.run(ask())
    for limit, text in zip(huge, told, strict=True):
        assert f"start it with --{limit}" in text
    assert counted == 3
    assert max(waited) < 5  # a prompt of 10 MB that is read holds everybody for 13 s


def test_message_that_is_too_large_is_told_the_limit_when_its_connection_closes(policy: Pi05Policy) -> None:
    async def ask() -> ConnectionClosed:
        limits = Limits(max_message_bytes=100_000)
        async with served_inside(policy, limits=limits) as (_, address), connect(f"ws://{address}") as client:
            await client.recv()
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.gather(client.send(bytes(20 * 2**20)), client.recv())
            return closed.value

    closed = asyncio.run(ask())
    assert closed.rcvd is not None
    assert closed.rcvd.code == 1009
    assert closed.rcvd.reason == "a message of more than 100000 bytes: raise --max_message_bytes"


def test_compressed_messages_are_not_taken(policy: Pi05Policy) -> None:
    async def ask() -> list[Any]:
        async with served_inside(policy) as (_, address), connect(f"ws://{address}", compression="deflate") as client:
            return client.protocol.extensions

    assert asyncio.run(ask()) == []


@pytest.mark.parametrize(
    "name", ["max_message_bytes", "max_image_bytes", "max_values", "max_clients", "client_timeout"]
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_at_least_one(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        Limits(**{name: value})


def test_long_instruction_is_refused_before_it_is_read(served: Any) -> None:
    ours = {"image": {"top": PICTURE.transpose(2, 0, 1), "wrist": PICTURE.transpose(2, 0, 1)}, "state": np.zeros(4)}
    policy = Pi05Policy(served)
    assert policy.acting.max_prompt_bytes == 1024
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"task has 10485760 bytes, and max_prompt_bytes is 1024: shorten it"):
        policy.predict(ours | {"task": "open the drawer " * 2**16 * 10})
    assert time.perf_counter() - start < 2
    with pytest.raises(ValueError, match=r"task has 1026 bytes"):
        policy.predict_subtask(ours | {"task": "ä" * 513})
    policy.predict(ours | {"task": "open the drawer " * 64})
    Pi05Policy(served, max_prompt_bytes=None).predict(ours | {"task": "open the drawer " * 65})


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_length_of_instructions_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="max_prompt_bytes is"):
        Acting(max_prompt_bytes=value)
