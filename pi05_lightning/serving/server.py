"""A policy behind a websocket, as openpi's clients expect it.

The server sends its metadata first. Then every binary message is an observation and is answered by
{"actions": f32[T A], "subtask": str, "server_timing": {…}}, or by text, which says what was wrong with it.
Every client has a policy of its own over shared weights: subtask, noise and a client's mistakes concern no other.
Requests that wait are answered together (batches.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from time import perf_counter

import numpy as np
from aiohttp import WSMsgType, web

from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.serving.batches import Batches, Batching, Busy, Client
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.wire import pack

MAX_MESSAGE_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)


class PolicyServer:
    """Answers any number of clients.

    policy: whose weights all clients share;  read: makes its observations of theirs;  seed: of every client's noise;
    name: what the metadata calls the policy;  batching: how requests are answered together.
    """

    def __init__(
        self, policy: Pi05Policy, read: Reader, seed: int = 0, name: str = "", batching: Batching | None = None
    ) -> None:
        self.policy, self.seed = policy, seed
        self.batches = Batches(read, batching or Batching())
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
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
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
        app.cleanup_ctx.append(self._computing)
        return app

    async def _computing(self, app: web.Application) -> AsyncIterator[None]:
        computing = asyncio.create_task(self.batches.run())
        yield
        computing.cancel()
        with suppress(asyncio.CancelledError):
            await computing

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="OK\n")

    async def _client(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False)
        await socket.prepare(request)
        logger.info("%s connected", request.remote)
        await socket.send_bytes(pack(self.metadata))
        with self.batches.client(self.policy.session(self.seed)) as client:
            await self._converse(socket, client, str(request.remote))
        logger.info("%s disconnected", request.remote)
        return socket

    async def _converse(self, socket: web.WebSocketResponse, client: Client, name: str) -> None:
        total: float | None = None
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                await socket.send_str(f"an observation is a binary message, not {message.type.name.lower()}")
                continue
            start = perf_counter()
            try:
                answer = await self.batches.answer(client, message.data)
            except Exception as error:  # whatever is wrong is this client's answer, and the server goes on
                logger.warning("%s: %s", name, error, exc_info=not isinstance(error, ValueError | Busy))
                await socket.send_str(f"{type(error).__name__}: {error}")
                continue
            if total is not None:
                answer["server_timing"]["prev_total_ms"] = 1e3 * total
            await socket.send_bytes(pack(answer))
            total = perf_counter() - start


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
