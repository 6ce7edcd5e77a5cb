"""A policy behind a websocket, as openpi's clients expect it.

The server sends its metadata first. Then every binary message is an observation and is answered by
{"actions": f32[T A], "subtask": str, "server_timing": {…}}, or by text, which says what was wrong with it.
Every client has a policy of its own over shared weights: subtask, noise and a client's mistakes concern no other.
"""

from __future__ import annotations

import asyncio
import difflib
import errno
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

from pi05_lightning.data.errors import suggestion
from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.data.observation import as_array, as_pixels, as_vector
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.serving.wire import pack, unpack

MAX_MESSAGE_BYTES = 256 * 2**20
TASK_KEYS = ("prompt", "task")
RESET_KEY = "reset"
PREFIX_KEY = "prefix_actions"
NEARLY_THE_SAME = 0.8  # difflib's ratio from which on a key is another one misspelt, whatever it holds

logger = logging.getLogger(__name__)


class Reader:
    """Finds what a policy needs in an openpi observation, and that nothing in it is meant for it and misnamed.

    Numbers, truth values and text that nothing reads are let through; arrays are not, nor what is called nearly like
    something that is not there, nor text where there is no instruction.

    Args:
        cameras: the policy's.
        named: the policy's cameras with their keys in the observation, where those differ.
        state_keys: keys that make up the state, by default the one whose last part is `state`.
        ignored_keys: keys, or their last parts, that are not looked at.
        missing_cameras: cameras that an observation may lack.

    Raises ValueError for a camera that the policy does not have, and for two cameras of one key.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        named: Mapping[str, str],
        state_keys: Sequence[str] | None,
        ignored_keys: Collection[str] = (),
        missing_cameras: Collection[str] = (),
    ) -> None:
        for camera in named:
            if camera not in cameras:
                hint = suggestion(camera, cameras)
                raise ValueError(f"cameras: the policy has no {camera}{hint}; it has {', '.join(cameras)}")
        self.keys = {camera: named.get(camera, camera) for camera in cameras}
        if len(set(self.keys.values())) < len(self.keys):
            raise ValueError(f"cameras: two cameras have one key in {self.keys}")
        self.state_keys = state_keys
        self.ignored_keys, self.required = ignored_keys, set(named) - set(missing_cameras)
        self.needs_images = set(cameras) - set(missing_cameras)

    def __call__(self, message: Any) -> dict[str, Any]:
        """An observation for `Pi05Policy`. Raises ValueError that says what is missing and what there is."""
        if not isinstance(message, dict):
            raise ValueError(f"an observation is a dictionary, not a {type(message).__name__}")
        found = {key: value for key, value in _flat(message).items() if not self._ignores(key)}
        images, state = self._image_keys(found), self._state_keys(found)
        tasks = {key: _text(key, found[key]) for key in TASK_KEYS if key in found}
        self._reject_unread(found, {*images.values(), *state, *tasks, RESET_KEY, PREFIX_KEY})
        if self.needs_images and not images:
            raise ValueError(f"no image: expected one of {_listed(self.keys.values())}, got {_listed(found)}")
        observation: dict[str, Any] = {
            "image": {camera: _channels_first(found[key], key) for camera, key in images.items()},
            "state": np.concatenate([as_vector(key, found[key]) for key in state]) if state else None,
        }
        if len(set(tasks.values())) > 1:
            raise ValueError(f"{' and '.join(tasks)} differ: send one")
        return observation | ({"task": next(iter(tasks.values()))} if tasks else {})

    def _image_keys(self, found: Mapping[str, Any]) -> dict[str, str]:
        """The keys of the cameras that are there, among them all that were named when the server started."""
        images = {camera: key for camera, wanted in self.keys.items() if (key := _match(wanted, found)) is not None}
        if len(set(images.values())) < len(images):
            raise ValueError(f"two cameras would read one key, {images}: name their keys when the server starts")
        for camera in self.required - set(images):
            key = self.keys[camera]
            raise ValueError(f"no {key}, named as the camera {camera}{suggestion(key, found)}: got {_listed(found)}")
        return images

    def _state_keys(self, found: Mapping[str, Any]) -> Sequence[str]:
        if self.state_keys is None:
            key = _match("state", found)
            return () if key is None else (key,)
        for key in self.state_keys:
            if key not in found:
                raise ValueError(f"no {key} for the state{suggestion(key, found)}: got {_listed(found)}")
        return self.state_keys

    def _ignores(self, key: str) -> bool:
        return key in self.ignored_keys or _last(key) in self.ignored_keys

    def _reject_unread(self, found: Mapping[str, Any], read: set[str]) -> None:
        """Raises ValueError for a key that a client sends to be read and that nothing reads."""
        state = ("state",) if self.state_keys is None else self.state_keys
        wanted = {_last(key): key for key in (*self.keys.values(), *state, *TASK_KEYS, RESET_KEY, PREFIX_KEY)}
        lacking = wanted.keys() - {_last(key) for key in read & found.keys()}
        for key, value in found.items():
            near = difflib.get_close_matches(_last(key), lacking, n=1, cutoff=NEARLY_THE_SAME)
            is_instruction = isinstance(value, str) and read.isdisjoint(TASK_KEYS)
            if key not in read and (near or is_instruction or _holds_data(value)):
                known = f"{_listed(self.keys.values())}; {' + '.join(state)}; {' or '.join(TASK_KEYS)}"
                raise ValueError(
                    f"nothing reads {key}{suggestion(key, wanted)}: images, state and instruction are {known}. Send it"
                    " so, name it when the server starts (--cameras, --state_keys), or ignore it (--ignored_keys)"
                )


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
            "cameras": list(read.keys.values()),
            "action_horizon": policy.execution_horizon,
            "acting": asdict(policy.resolved),
            "action_dim": robot.action_dim,
            "fps": robot.fps,
            "tasks": list(robot.tasks),
        }

    def warm_up(self) -> None:
        """Answer once, so that the first client does not wait for what a first call sets up."""
        size, robot = self.policy.processor.shapes.image_size, self.policy.processor.robots[self.policy.robot]
        policy = self.policy.session(self.seed)
        policy.acting = replace(policy.acting, max_action_distance=None)  # nobody executes them
        observation = {
            "image": {camera: np.zeros((3, size, size), np.uint8) for camera in policy.inputs.cameras},
            "state": np.asarray(robot.normalize.state.q01, np.float32) if robot.state_dim else None,
            "task": robot.tasks[0] if robot.tasks else "warm up",
        }
        with suppress(FastDecodeError):  # what it says to a made-up observation may be no chunk
            policy.predict_chunk(observation)

    async def run(self, host: str, port: int) -> None:
        """Serve until cancelled. Raises OSError as `check_address`."""
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            with _explained(host, port):
                await web.TCPSite(runner, host, port).start()
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
        reset = message.get(RESET_KEY, False)
        if not isinstance(reset, bool | np.bool_):
            raise ValueError(f"{RESET_KEY} is {reset!r}: give true or false")
        tasks = policy.processor.robots[policy.robot].tasks
        if "task" not in observation and len(tasks) != 1:
            raise ValueError(f"no instruction: expected text under {' or '.join(TASK_KEYS)}")
        if reset:
            policy.reset()
        start = perf_counter()
        sent = policy.acting.inference_delay + policy.execution_horizon
        actions = policy.predict_chunk(observation, prefix_actions=message.get(PREFIX_KEY))[:sent]
        answer: dict[str, Any] = {"actions": actions, "server_timing": {"infer_ms": 1e3 * (perf_counter() - start)}}
        return answer if policy.subtask is None else answer | {"subtask": policy.subtask}


async def check_address(host: str, port: int) -> None:
    """Raises OSError when no server can listen there, and ValueError for what is no port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}: give 0, which takes a free one, to 65535")
    with _explained(host, port):
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    server.close()
    await server.wait_closed()


@contextmanager
def _explained(host: str, port: int) -> Iterator[None]:
    """What asyncio says of an address that cannot be listened at, and what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} is in use: choose another with --port, or 0 for a free one"
        elif error.errno in (errno.EACCES, errno.EPERM):
            problem = f"port {port} is not allowed: choose one from 1024 on with --port"
        else:
            problem = "no address of this machine: choose one with --host"
        raise OSError(f"cannot listen at {host}:{port}, {problem} ({error})") from error


def _flat(message: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dictionaries with their keys joined by slashes. Raises ValueError when two are then the same."""
    found: dict[str, Any] = {}
    for key, value in message.items():
        name = f"{above}{key}"
        below = _flat(value, f"{name}/") if isinstance(value, dict) else {name: value}
        if twice := sorted(found.keys() & below.keys()):
            raise ValueError(f"{twice[0]} comes twice: send it once")
        found |= below
    return found


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(keys) or "nothing"


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}: give text")
    return value


def _last(key: str) -> str:
    return key.replace(".", "/").rpartition("/")[2]


def _holds_data(value: Any) -> bool:
    """Whether it is of the kind of images and states: an array, a list of numbers, the bytes of an image."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], int | float | list | np.ndarray | np.number)
    return isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _match(wanted: str, found: Mapping[str, Any]) -> str | None:
    """The key that is `wanted`, or the only one whose last part is. Raises ValueError when several are."""
    if wanted in found:
        return wanted
    keys = [key for key in found if _last(key) == wanted]
    if len(keys) > 1:
        raise ValueError(f"{' and '.join(keys)} could both be {wanted!r}: send one, or name it when the server starts")
    return keys[0] if keys else None


def _channels_first(image: Any, key: str) -> np.ndarray:
    array = as_array(key, image)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(f"image {key!r} has the shape {list(array.shape)}: expected [H W 3] or [3 H W]")
    as_pixels(key, array)  # what is wrong has the place that it has for the client
    return array if array.shape[0] == 3 else array.transpose(2, 0, 1)
