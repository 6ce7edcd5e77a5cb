"""A policy behind a websocket, as openpi's clients expect it.

The server sends its metadata first. Then every binary message is an observation and is answered by
{"actions": f32[T A], "subtask": str, "server_timing": {…}}, or by text, which says what was wrong with it.
Every client has a policy of its own over shared weights: subtask, noise and a client's mistakes concern no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

from pi05_lightning.policy import Pi05Policy
from pi05_lightning.serving.wire import pack, unpack

MAX_MESSAGE_BYTES = 256 * 2**20
TASK_KEYS = ("prompt", "task")

logger = logging.getLogger(__name__)


class Reader:
    """Finds what a policy needs in an openpi observation.

    cameras: the policy's;  named: the policy's cameras with their keys in the observation, where those differ;
    state_keys: keys that make up the state, by default the one whose last part is `state`.
    """

    def __init__(self, cameras: tuple[str, ...], named: Mapping[str, str], state_keys: list[str] | None) -> None:
        unknown = sorted(set(named) - set(cameras))
        if unknown:
            raise ValueError(f"cameras: the policy has no {', '.join(unknown)}; it has {', '.join(cameras)}")
        self.keys = {named.get(camera, camera): camera for camera in cameras}
        self.state_keys = state_keys

    def __call__(self, message: Any) -> dict[str, Any]:
        """An observation for `Pi05Policy`. Raises ValueError that says what is missing and what there is."""
        if not isinstance(message, dict):
            raise ValueError(f"an observation is a dictionary, not a {type(message).__name__}")
        found = _flat(message)
        images = {
            camera: _channels_first(found[key], key)
            for wanted, camera in self.keys.items()
            if (key := _match(wanted, found)) is not None
        }
        if not images:
            raise ValueError(f"no image: expected one of {', '.join(self.keys)}, got {', '.join(found) or 'nothing'}")
        task = next((found[key] for key in TASK_KEYS if key in found), None)
        if not isinstance(task, str):
            raise ValueError(f"no instruction: expected text under {' or '.join(TASK_KEYS)}")
        return {"image": images, "state": self._state(found), "task": task}

    def _state(self, found: Mapping[str, Any]) -> np.ndarray | None:
        if self.state_keys is None:
            key = _match("state", found)
            return None if key is None else np.asarray(found[key], np.float32).reshape(-1)
        missing = [key for key in self.state_keys if key not in found]
        if missing:
            raise ValueError(f"no {', '.join(missing)} for the state: got {', '.join(found)}")
        return np.concatenate([np.asarray(found[key], np.float32).reshape(-1) for key in self.state_keys])


class PolicyServer:
    """Answers any number of clients.

    policy: whose weights all clients share;  read: makes its observations of theirs;  seed: of every client's noise;
    name: what the metadata calls the policy.
    """

    def __init__(self, policy: Pi05Policy, read: Reader, seed: int = 0, name: str = "") -> None:
        self.policy, self.read, self.seed = policy, read, seed
        robot = policy.processor.robots[policy.robot]
        self.metadata = {
            "policy": "pi05_lightning",
            "checkpoint": name,
            "cameras": list(read.keys),
            "action_horizon": policy.execution_horizon,
            "action_dim": robot.action_dim,
            "fps": robot.fps,
            "tasks": list(robot.tasks),
        }

    def warm_up(self) -> None:
        """Answer once, so that the first client does not wait for what a first call sets up."""
        size, robot = self.policy.processor.shapes.image_size, self.policy.processor.robots[self.policy.robot]
        self.policy.session(self.seed).predict_chunk(
            {
                "image": {camera: np.zeros((3, size, size), np.uint8) for camera in self.policy.processor.cameras},
                "state": np.asarray(robot.normalize.state.q01, np.float32),
                "task": robot.tasks[0] if robot.tasks else "",
            }
        )

    async def run(self, host: str, port: int) -> None:
        """Serve until cancelled."""
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            address, bound = runner.addresses[0][:2]
            logger.info("serving at ws://%s:%d", address, bound)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/", self._client)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="OK\n")

    async def _client(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False)
        await socket.prepare(request)
        logger.info("%s connected", request.remote)
        policy = self.policy.session(self.seed)
        await socket.send_bytes(pack(self.metadata))
        total: float | None = None
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                await socket.send_str(f"an observation is a binary message, not {message.type.name.lower()}")
                continue
            start = perf_counter()
            try:
                answer = await asyncio.to_thread(self._answer, policy, message.data)
            except Exception as error:  # whatever is wrong is this client's answer, and the server goes on
                logger.warning("%s: %s", request.remote, error, exc_info=not isinstance(error, ValueError))
                await socket.send_str(f"{type(error).__name__}: {error}")
                continue
            if total is not None:
                answer["server_timing"]["prev_total_ms"] = 1e3 * total
            await socket.send_bytes(pack(answer))
            total = perf_counter() - start
        logger.info("%s disconnected", request.remote)
        return socket

    def _answer(self, policy: Pi05Policy, data: bytes) -> dict[str, Any]:
        message = unpack(data)
        observation = self.read(message)
        if message.get("reset"):
            policy.reset()
        start = perf_counter()
        actions = policy.predict_chunk(observation)[: policy.execution_horizon]
        answer: dict[str, Any] = {"actions": actions, "server_timing": {"infer_ms": 1e3 * (perf_counter() - start)}}
        return answer if policy.subtask is None else answer | {"subtask": policy.subtask}


def _flat(message: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dictionaries with their keys joined by slashes."""
    found: dict[str, Any] = {}
    for key, value in message.items():
        name = f"{above}{key}"
        found |= _flat(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return found


def _match(wanted: str, found: Mapping[str, Any]) -> str | None:
    """The key that is `wanted`, or the only one whose last part is. Raises ValueError when several are."""
    if wanted in found:
        return wanted
    keys = [key for key in found if key.replace(".", "/").rpartition("/")[2] == wanted]
    if len(keys) > 1:
        raise ValueError(f"{' and '.join(keys)} could both be {wanted!r}: send one, or name it when the server starts")
    return keys[0] if keys else None


def _channels_first(image: Any, key: str) -> np.ndarray:
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 3 and array.shape[0] != 3:
        return array.transpose(2, 0, 1)
    if array.ndim == 3 and array.shape[0] == 3:
        return array
    raise ValueError(f"image {key!r} has the shape {list(array.shape)}: expected [H W 3] or [3 H W]")
