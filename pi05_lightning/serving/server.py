"""A policy behind a websocket, as openpi's clients expect it.

The server sends its metadata first. Then every binary message is an observation and is answered by
{"actions": f32[T A], "subtask": str, "server_timing": {…}}, or by text, which says what was wrong with it.
Every client has a policy of its own over shared weights: subtask, noise and a client's mistakes concern no other.
Requests that wait are answered together (batches.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, web

from pi05_lightning.acting.together import Request
from pi05_lightning.data.errors import BadFrame
from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.serving.access import Access
from pi05_lightning.serving.address import listen
from pi05_lightning.serving.batches import Answer, Batches, Batching, Busy, Client
from pi05_lightning.serving.connection import Connection, Socket
from pi05_lightning.serving.failures import kind_of, told_of
from pi05_lightning.serving.limits import Limits
from pi05_lightning.serving.metrics import Metrics
from pi05_lightning.serving.reader import TASK_KEYS, Reader
from pi05_lightning.serving.wire import PREFIX_KEY, RESET_KEY, pack, unpack

log = logging.getLogger(__name__)


class PolicyServer:
    """Answers any number of clients.

    policy: whose weights all clients share;  read: makes its observations of theirs;  seed: of every client's noise;
    name: what the metadata calls the policy;  batching: how requests are answered together;  limits: of messages and
    clients, but max_prompt_bytes is the policy's;  access: who may ask.
    """

    def __init__(
        self,
        policy: Pi05Policy,
        read: Reader,
        seed: int = 0,
        name: str = "",
        batching: Batching | None = None,
        limits: Limits | None = None,
        access: Access | None = None,
    ) -> None:
        self.policy, self.read, self.seed = policy, read, seed
        self.limits = replace(limits or Limits(), max_prompt_bytes=policy.inputs.max_prompt_bytes)
        self.access = access or Access()
        self._connections: dict[Connection, asyncio.Task[object]] = {}
        self._draining = False
        self.metrics = Metrics()
        self.batches = Batches(self._request, batching or Batching(), self.metrics.computed)
        self.metrics.watch("clients", "Clients that are connected.", lambda: len(self._connections))
        self.metrics.watch(
            "pending", "Requests that are not answered yet.", lambda: sum(c.pending for c in self._connections)
        )
        self.metrics.watch("queue_length", "Those of them that wait for the model.", lambda: self.batches.waiting)
        robot = policy.processor.robots[policy.robot]
        self.metadata = {
            "policy": "pi05_lightning",
            "checkpoint": name,
            "cameras": list(read.keys.values()),
            "action_horizon": policy.execution_horizon,
            "acting": asdict(policy.resolved),
            "action_dim": robot.action_dim,
            "fps": robot.fps if robot.fps_is_known else None,
            "tasks": list(robot.tasks),
        }

    def warm_up(self) -> None:
        """Answer as often as there are kinds of requests, so that no client waits for what a first call sets up."""
        size, robot = self.policy.processor.shapes.image_size, self.policy.processor.robots[self.policy.robot]
        policy = self.policy.session(self.seed)
        policy.acting = replace(policy.acting, max_action_distance=None)  # nobody executes them
        quantiles = robot.normalize.state
        given = [np.zeros((policy.acting.given, robot.action_dim), np.float32)] if policy.acting.given else []
        # prompts write a state's numbers with one to three digits: the shortest and the longest
        for state in (quantiles.q01, quantiles.q99) if robot.state_dim else (None,):
            observation = {
                "image": {camera: np.zeros((3, size, size), np.uint8) for camera in policy.inputs.cameras},
                "state": None if state is None else np.asarray(state, np.float32),
                "task": max(robot.tasks, key=len, default="warm up"),
            }
            try:
                for first in (None, *given):
                    with suppress(FastDecodeError):  # what it says to a made-up observation may be no chunk
                        policy.predict_chunk(observation, prefix_actions=first)
            except BadFrame as error:  # clients' may be shorter
                log.warning("prompts as long as a made-up one are not prepared for: %s", error)

    async def run(self, host: str, port: int) -> None:
        """Serve until cancelled. Raises OSError as `check_address`."""
        await listen(self.app(), host, port, self.limits.client_timeout, "ws")

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/", self._client)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.on_shutdown.append(lambda _: self.drain(0))
        app.cleanup_ctx.append(self._computing)
        return app

    async def _computing(self, app: web.Application) -> AsyncIterator[None]:
        computing = asyncio.create_task(self.batches.run())
        yield
        computing.cancel()
        with suppress(asyncio.CancelledError):
            await computing

    async def drain(self, seconds: float) -> bool:
        """Take no more clients and requests; answer those that wait and close. False where that took too long."""
        self._draining = True
        for connection in self._connections:
            connection.leave()
        late = set(self._connections.values())
        if late:
            _, late = await asyncio.wait(late, timeout=seconds)
        for connection in self._connections:
            connection.stop()
        if late:
            await asyncio.wait(late)
        return not late

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="OK\n")

    async def _ready(self, request: web.Request) -> web.Response:
        return web.Response(status=503, text="stopping\n") if self._draining else web.Response(text="OK\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        self._let_in(request)
        return self.metrics.page()

    def _let_in(self, request: web.Request) -> None:
        try:
            self.access.check(request)
        except web.HTTPException:
            self.metrics.failed("access")
            raise

    def _full(self) -> str | None:
        """Why one more client is not served, in 123 bytes; None when it is."""
        if self._draining:
            return "the server stops"
        most = self.limits.max_clients
        return None if len(self._connections) < most else f"{most} clients are connected: raise --max_clients"

    async def _client(self, request: web.Request) -> web.WebSocketResponse:
        self._let_in(request)
        socket = Socket(self.limits)
        await socket.prepare(request)
        if full := self._full():
            log.warning("%s: not served, %s", request.remote, full)
            self.metrics.failed("clients")
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=full.encode())
            return socket
        with self.batches.client(self.policy.session(self.seed)) as client:
            answer = partial(self._reply, client, request.remote)
            connection = Connection(request, socket, answer, self.limits, self.metrics, pack(self.metadata))
            task = asyncio.current_task()
            assert task is not None
            self._connections[connection] = task
            log.info("%s connected", request.remote)
            try:
                await connection.run()
            finally:
                del self._connections[connection]
                log.info("%s disconnected", request.remote)
        return socket

    async def _reply(self, client: Client, remote: str | None, data: bytes, previous: float | None) -> bytes | str:
        """The answer to a message, or what is wrong with it."""
        try:
            answer = self._message(await self.batches.answer(client, data))
        except Exception as error:  # whatever is wrong is this client's answer, and the server goes on
            told = told_of(error)
            log.warning("%s: %s", remote, told, exc_info=not isinstance(error, ValueError | Busy))
            self.metrics.failed(kind_of(error))
            return told
        if previous is not None:
            answer["server_timing"]["prev_total_ms"] = 1e3 * previous
        self.metrics.requests.inc()
        return pack(answer)

    def _request(self, policy: Pi05Policy, data: bytes) -> Request:
        start = perf_counter()
        self.limits.check(data)
        message = unpack(data)
        reset = message.get(RESET_KEY, False) if isinstance(message, dict) else False
        if not isinstance(reset, bool | np.bool_):
            raise ValueError(f"{RESET_KEY} is {reset!r}: give true or false")
        if reset:  # whatever is wrong with the rest: nothing of the last episode is for this one
            policy.reset()
        observation = self.read(message)
        tasks = policy.processor.robots[policy.robot].tasks
        if "task" not in observation and len(tasks) != 1:
            raise ValueError(f"no instruction: expected text under {' or '.join(TASK_KEYS)}")
        request = policy.request(observation, prefix_actions=message.get(PREFIX_KEY))
        given, most = 0 if request.given is None else len(request.given.actions), policy.acting.given
        if given > most:
            option = "--rtc false" if policy.acting.inference_delay and not policy.acting.rtc else "--inference_delay"
            raise ValueError(f"{PREFIX_KEY} has {given} actions, and {option} lets at most {most} be given")
        self.metrics.took("reading", perf_counter() - start)
        return request

    def _message(self, answer: Answer) -> dict[str, Any]:
        sent = self.policy.acting.inference_delay + self.policy.execution_horizon
        timing = {
            "infer_ms": 1e3 * (answer.batch.subtask_seconds + answer.batch.chunk_seconds),
            "wait_ms": 1e3 * answer.waited,
            "batch_size": len(answer.batch.waited),
        }
        message: dict[str, Any] = {"actions": answer.chunk[:sent], "server_timing": timing}
        return message if answer.subtask is None else message | {"subtask": answer.subtask}
