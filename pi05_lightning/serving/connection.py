"""One client's websocket: it is read, and its pings are answered, while its requests are computed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import perf_counter

from aiohttp import WSCloseCode, WSMsgType, web

from pi05_lightning.serving.limits import Limits
from pi05_lightning.serving.metrics import Metrics

MAX_WAITING = 64
"""Requests of one client that may wait for those before them; together they are no larger than one message may be."""
CLOSING = 2.0  # seconds for a client to read why the connection is closed, and to say that it did

log = logging.getLogger(__name__)


class SlowClient(Exception):
    """A client answered no ping, or took no answer."""


def abort(request: web.Request) -> None:
    """End a connection at once: saying goodbye waits for a client that reads nothing."""
    if request.transport is not None:
        request.transport.abort()


class Socket(web.WebSocketResponse):
    """A websocket that says, when a message is too large, what the limit is."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(timeout=CLOSING, autoping=False, max_msg_size=limits.max_message_bytes, compress=False)
        self._too_large = f"a message of more than {limits.max_message_bytes} bytes: raise --max_message_bytes"

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        if code == WSCloseCode.MESSAGE_TOO_BIG and not self.closed:
            # closing at once would reset the connection under the rest of the message, and nobody would read why
            await self.send_frame(code.to_bytes(2) + self._too_large.encode(), WSMsgType.CLOSE)
            await asyncio.sleep(CLOSING)
        return await super().close(code=code, message=message, drain=drain)


class Connection:
    """Reads a client's messages and answers them in their order, until the client leaves or the server stops.

    answer: to a message, given the seconds that the last answer took in all: bytes, or text which says what is wrong.
    It is cancelled when the client leaves.
    """

    def __init__(
        self,
        request: web.Request,
        socket: Socket,
        answer: Callable[[bytes, float | None], Awaitable[bytes | str]],
        limits: Limits,
        metrics: Metrics,
        greeting: bytes,
    ) -> None:
        self.greeting = greeting
        self.request, self.socket, self.answer = request, socket, answer
        self.limits, self.metrics = limits, metrics
        self._waiting: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        self._waiting_bytes = 0
        self._room = asyncio.Semaphore(4 * MAX_WAITING)  # beyond, a client that takes no answers is not read on
        self._answering = self._leaving = False
        self._heard = True
        self._stopped = asyncio.Event()

    @property
    def pending(self) -> int:
        """Requests that wait or are being answered."""
        return self._waiting.qsize() + self._answering

    def leave(self) -> None:
        """Take no more requests, and close when those that wait are answered."""
        self._leaving = True
        self._waiting.put_nowait(None)

    def stop(self) -> None:
        """Close at once."""
        self._leaving = True
        self._stopped.set()

    async def run(self) -> None:
        """Until it has ended, for whatever reason."""
        tasks = [
            asyncio.create_task(part) for part in (self._read(), self._reply(), self._watch(), self._stopped.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._answering and not self._leaving:
                self.metrics.failed("left")
        try:
            for task in done:
                task.result()
            if self._leaving and not self.socket.closed:
                await self._in_time(self.socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops"))
        except SlowClient as error:
            log.warning("%s: %s: its connection is ended", self.request.remote, error)
            self.metrics.failed("slow")
            abort(self.request)
        except ConnectionError:
            pass  # it left in the middle of a frame

    async def _read(self) -> None:
        """Put messages, and what is wrong with them, into the queue, until the client leaves."""
        async for message in self.socket:
            if message.type is WSMsgType.PING:
                await self._in_time(self.socket.pong(message.data))
            elif message.type is WSMsgType.PONG:
                self._heard = True
            elif message.type is WSMsgType.ERROR:
                log.warning("%s: %s: its connection is ended", self.request.remote, message.data)
                self.metrics.failed("protocol")
            elif not self._leaving:
                await self._room.acquire()
                self._waiting.put_nowait(self._admitted(message.type, message.data))

    def _admitted(self, kind: WSMsgType, data: bytes | str) -> bytes | str:
        """The message, or text that says why it is not answered."""
        if not isinstance(data, bytes):
            self.metrics.failed("observation")
            return f"an observation is a binary message, not {kind.name.lower()}"
        waiting = self._waiting.qsize()
        if waiting >= MAX_WAITING or (waiting and self._waiting_bytes + len(data) > self.limits.max_message_bytes):
            self.metrics.failed("queue")
            return (
                f"{waiting} requests of this client wait already, with {self._waiting_bytes} bytes: read their answers"
                f" before you send more (at most {MAX_WAITING}, and --max_message_bytes in all)"
            )
        self._waiting_bytes += len(data)
        return data

    async def _reply(self) -> None:
        """Answer what is in the queue, until there is None."""
        await self._in_time(self.socket.send_bytes(self.greeting))
        total: float | None = None
        while (message := await self._waiting.get()) is not None:
            start = perf_counter()
            if isinstance(message, bytes):
                self._waiting_bytes -= len(message)
                self._answering = True
                message = await self.answer(message, total)
                self._answering = False
            sending = perf_counter()
            if isinstance(message, str):
                await self._in_time(self.socket.send_str(message))
            else:
                await self._in_time(self.socket.send_bytes(message))
                self.metrics.took("writing", perf_counter() - sending)
            self._room.release()
            total = perf_counter() - start

    async def _watch(self) -> None:
        """Raises SlowClient when it answers no ping within `client_timeout`, as one does not that is gone.

        aiohttp's own heartbeat takes every byte for an answer, also of a message that never ends.
        """
        while self._heard or self._room.locked():  # it may be that nothing more is read of it for now
            self._heard = False
            await self._in_time(self.socket.ping())
            for _ in range(10):  # in steps: while this process stands still, the client cannot answer
                await asyncio.sleep(self.limits.client_timeout / 10)
        raise SlowClient(f"no answer to a ping for {self.limits.client_timeout:g} s (--client_timeout)")

    async def _in_time(self, sending: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(self.limits.client_timeout):
                await sending
        except TimeoutError as error:
            raise SlowClient(f"took no answer for {self.limits.client_timeout:g} s (--client_timeout)") from error
