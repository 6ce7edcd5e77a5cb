"""The policy server: openpi's protocol, several clients at once, and mistakes that stay their client's."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType
from aiohttp.test_utils import TestServer

from pi05_lightning import Pi05Policy
from pi05_lightning.serving.server import PolicyServer, Reader
from pi05_lightning.serving.wire import pack, unpack

PICTURE = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
OBSERVATION = {
    "observation/top": PICTURE,
    "observation/wrist": PICTURE,
    "observation/state": np.zeros(4),
    "prompt": "open the drawer",
}
OURS = {
    "image": {"top": PICTURE.transpose(2, 0, 1), "wrist": PICTURE.transpose(2, 0, 1)},
    "state": np.zeros(4, np.float32),
    "task": "open the drawer",
}


class Client:
    """What openpi's client does: read the metadata, then send observations and read the answers."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket

    async def metadata(self) -> dict[str, Any]:
        return unpack(await self.socket.receive_bytes())

    async def infer(self, observation: Any) -> Any:
        await self.socket.send_bytes(observation if isinstance(observation, bytes) else pack(observation))
        message = await self.socket.receive()
        return message.data if message.type is WSMsgType.TEXT else unpack(message.data)


def talk(policy: Pi05Policy, conversation: Callable[..., Awaitable[Any]], clients: int = 1) -> Any:
    """What a conversation of some clients with a server, all of them connected, comes to."""

    async def run() -> Any:
        server = PolicyServer(policy, Reader(policy.processor.cameras, {}, None))
        async with TestServer(server.app()) as address, ClientSession() as session:
            connected = [Client(await session.ws_connect(address.make_url("/"))) for _ in range(clients)]
            for client in connected:
                assert (await client.metadata())["action_dim"] == 2
            return await conversation(*connected)

    return asyncio.run(run())


def test_actions_are_those_of_the_policy(policy, served):
    answer = talk(policy, lambda client: client.infer(OBSERVATION))
    executed = Pi05Policy(served).predict_chunk(OURS)[: policy.execution_horizon]
    np.testing.assert_allclose(answer["actions"], executed, rtol=1e-5)
    assert answer["subtask"] == Pi05Policy(served).predict_subtask(OURS)


def test_answer_says_how_long_it_took(policy):
    async def twice(client):
        return [(await client.infer(OBSERVATION))["server_timing"] for _ in range(2)]

    first, second = talk(policy, twice)
    assert set(first) == {"infer_ms"}
    assert 0 < first["infer_ms"] < second["prev_total_ms"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**OBSERVATION, "observation/state": np.zeros(9)}, "state has 9 dimensions"),
        ({**OBSERVATION, "observation/top": np.zeros((4, 4))}, r"'observation/top' has the shape \[4, 4\]"),
        ({"prompt": "go"}, "no image: expected one of top, wrist, got prompt"),
        ({key: value for key, value in OBSERVATION.items() if key != "prompt"}, "no instruction"),
        ({**OBSERVATION, "camera/state": np.zeros(4)}, "observation/state and camera/state could both be 'state'"),
        ([1, 2], "an observation is a dictionary, not a list"),
        (b"\xc1", "not msgpack"),
    ],
)
def test_mistake_is_answered_with_text_and_the_connection_lives(policy, bad, message):
    async def err_and_go_on(client):
        return await client.infer(bad), await client.infer(OBSERVATION)

    error, answer = talk(policy, err_and_go_on)
    assert re.search(message, error)
    assert answer["actions"].shape == (policy.execution_horizon, 2)


def test_policy_that_crashes_is_answered_with_text_and_the_server_stays(policy, monkeypatch):
    def crash(*_):
        raise RuntimeError("out of memory")

    async def crash_and_go_on(client, other):
        with monkeypatch.context() as broken:
            broken.setattr(Pi05Policy, "predict_chunk", crash)
            error = await client.infer(OBSERVATION)
        return error, await other.infer(OBSERVATION)

    error, answer = talk(policy, crash_and_go_on, clients=2)
    assert error == "RuntimeError: out of memory"
    assert "actions" in answer


def test_client_does_not_wait_for_another(policy, monkeypatch):
    let_go = threading.Event()
    original = Pi05Policy.predict_chunk

    def slow_for_one(self, observation):
        if observation["task"] == "wait":
            assert let_go.wait(60)
        return original(self, observation)

    monkeypatch.setattr(Pi05Policy, "predict_chunk", slow_for_one)

    async def overtake(slow, quick):
        waiting = asyncio.create_task(slow.infer({**OBSERVATION, "prompt": "wait"}))
        first = await quick.infer(OBSERVATION)
        assert not waiting.done()
        let_go.set()
        return first, await waiting

    assert all("actions" in answer for answer in talk(policy, overtake, clients=2))


def test_client_gets_the_same_whoever_else_asks(policy):
    async def together(*clients):
        return await asyncio.gather(*(client.infer(OBSERVATION) for client in clients))

    alone = talk(policy, together)[0]
    for answer in talk(policy, together, clients=3):
        np.testing.assert_array_equal(answer["actions"], alone["actions"])


def test_reset_begins_a_new_episode(policy):
    async def ask(client):
        first = await client.infer(OBSERVATION)
        again = await client.infer({**OBSERVATION, "reset": True})
        return first["subtask"], again["subtask"]

    first, again = talk(policy, ask)
    assert first == again


def test_unknown_camera_is_named_at_the_start():
    with pytest.raises(ValueError, match="no elbow; it has top, wrist"):
        Reader(("top", "wrist"), {"elbow": "x"}, None)


@pytest.mark.parametrize(
    "message",
    [
        OBSERVATION,
        {"observation": {"top": PICTURE, "wrist": PICTURE, "state": np.zeros(4)}, "prompt": "open the drawer"},
        {"images": OURS["image"], "state": np.zeros(4), "prompt": "open the drawer"},
        {"image": OURS["image"], "state": [0, 0, 0, 0], "task": "open the drawer"},
        {
            "observation.images.top": PICTURE,
            "observation.images.wrist": PICTURE,
            "observation.state": np.zeros((1, 4)),
            "task": "open the drawer",
        },
    ],
)
def test_observations_of_openpi_and_lerobot_are_understood(message):
    found = Reader(("top", "wrist"), {}, None)(message)
    np.testing.assert_equal(found, OURS)


def test_cameras_and_state_may_have_other_keys():
    read = Reader(("top", "wrist"), {"top": "observation/exterior_image_1_left"}, ["joints", "gripper"])
    found = read(
        {"observation/exterior_image_1_left": PICTURE, "joints": np.arange(3), "gripper": 7.0, "prompt": "pick"}
    )
    assert list(found["image"]) == ["top"]
    np.testing.assert_array_equal(found["state"], [0, 1, 2, 7])


def test_served_process_answers_and_is_healthy(served: Path):
    command = [sys.executable, "-m", "pi05_lightning", "serve", str(served), "--port", "0", "--execution_horizon", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        address = line.split("ws://")[1].strip()

        async def ask() -> tuple[int, dict[str, Any]]:
            async with ClientSession() as session, session.ws_connect(f"ws://{address}") as socket:
                client = Client(socket)
                await client.metadata()
                health = await session.get(f"http://{address}/healthz")
                return health.status, await client.infer(OBSERVATION)

        status, answer = asyncio.run(ask())
        assert (status, answer["actions"].shape) == (200, (1, 2))
    finally:
        process.terminate()
        process.communicate(timeout=60)
