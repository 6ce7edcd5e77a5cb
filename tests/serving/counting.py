"""A server of openpi's protocol whose policy counts: `python counting.py PORT [SECONDS]` runs one until it is killed.

The state is the number of actions that the robot has executed, and action k of a chunk is [state + k, chunk's number]:
an action that is executed at the step that it is due at equals the robot's state.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve

from pi05_lightning.serving.wire import pack, unpack

OURS = {"policy": "pi05_lightning", "action_horizon": 4, "acting": {"inference_delay": 4, "rtc": True}, "fps": 50.0}


class CountingServer:
    """seconds: that an answer takes;  length: of a chunk;  metadata: openpi's own, which is empty, or like `OURS`.

    asked: the observations that came;  say: by the number of a question what is answered instead of a chunk.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        length: int = 8,
        metadata: dict[str, Any] | None = None,
        token: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.seconds, self.length, self.metadata, self.token = seconds, length, metadata or {}, token
        self.max_bytes = max_bytes
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.say: dict[int, Any] = {}
        self.greeting: str | bytes = pack(self.metadata)

    async def talk(self, socket: ServerConnection) -> None:
        await socket.send(self.greeting)
        async for message in socket:
            observation, number = unpack(message), len(self.asked)
            self.asked.append(observation)
            await asyncio.sleep(self.seconds)
            answer = self.say.get(number)
            if answer == "drop":
                socket.transport.abort()
            elif answer == "crash":  # as openpi's server does
                await socket.send("Traceback (most recent call last): KeyError: 'image'")
                await socket.close(1011, "Internal server error. Traceback included in previous frame.")
            elif answer == "freeze":  # it answers this, and reads nothing more
                socket.transport.pause_reading()
                await socket.send(pack(self.chunk(observation, number)))
            elif answer != "nothing":
                answer = answer or self.chunk(observation, number)
                await socket.send(answer if isinstance(answer, str) else pack(answer))

    def chunk(self, observation: dict[str, Any], number: int) -> dict[str, Any]:
        state = observation["observation/state"][0]
        actions = np.stack([state + np.arange(self.length), np.full(self.length, number)], axis=1)
        prefix = observation.get("prefix_actions", np.zeros((0, 2)))
        actions[: len(prefix)] = prefix
        return {"actions": actions, "subtask": f"chunk {number}", "server_timing": {"infer_ms": 1e3 * self.seconds}}

    def let_in(self, socket: ServerConnection, request: Any) -> Any:
        self.headers.append(request.headers.get("Authorization"))
        if self.token is not None and self.headers[-1] != f"Api-Key {self.token}":
            return socket.respond(HTTPStatus.UNAUTHORIZED, "wrong token\n")
        return None

    async def run(self, port: int = 0, ready: Any = None, stop: Any = None) -> None:
        async with serve(
            self.talk,
            "127.0.0.1",
            port,
            process_request=self.let_in,
            compression=None,
            max_size=self.max_bytes,
            close_timeout=1.0,
        ) as server:
            if ready is not None:
                ready(server.sockets[0].getsockname()[1])
            await (stop.wait() if stop else asyncio.Event().wait())

    @contextmanager
    def running(self, port: int = 0) -> Iterator[str]:
        """Serve from a thread; gives the address."""
        loop, stop, ports = asyncio.new_event_loop(), asyncio.Event(), list[int]()
        started = threading.Event()

        def ready(port: int) -> None:
            ports.append(port)
            started.set()

        thread = threading.Thread(target=loop.run_until_complete, args=(self.run(port, ready, stop),))
        thread.start()
        try:
            assert started.wait(10)
            yield f"ws://127.0.0.1:{ports[0]}"
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
            loop.close()


if __name__ == "__main__":
    asyncio.run(CountingServer(*map(float, sys.argv[2:])).run(int(sys.argv[1])))
