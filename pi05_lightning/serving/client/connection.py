"""A websocket that stays: in a thread of its own, one request at a time, and connected anew whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from pi05_lightning.serving.wire import BUSY, checked_token, unpack

FIRST_DELAY, MAX_DELAY = 0.1, 5.0  # seconds before it connects anew; each is twice the last one
OPEN_TIMEOUT = 10.0
PING_INTERVAL, PING_TIMEOUT = 10.0, 20.0
TRY_AGAIN = (408, 425, 429)  # HTTP statuses from 400 to 499 that are no refusal
TOO_BIG = 1009  # the websocket's code for a message that is larger than the server takes

log = logging.getLogger(__name__)


class ServerError(RuntimeError):
    """The server's words about what is wrong with an observation, or what is wrong with its answer."""


class Busy(ServerError):
    """The server has too much to do for now."""


class Refused(ConnectionError):
    """The server does not let this client in, as where the token is another one."""


class Lost(ConnectionError):
    """The connection went before the answer came."""


@dataclass(frozen=True)
class Answer:
    """What the server answered, and how many seconds after it was asked."""

    message: dict[str, Any]
    seconds: float


class Connection:
    """A connection to a policy server of openpi's protocol.

    Args:
        url: ws://host:port, or wss:// behind TLS.
        token: what the server was started with; sent as openpi's clients send their `api_key`.
        answer_timeout: seconds, from when it is asked, after which an answer is no longer waited for; the connection
            is then made anew.

    metadata   what the server said about itself; None while there is no connection
    problem    why it is not connected, or was not when it last failed
    news       set when it connects, fails, or an answer comes

    Raises ValueError for what is no such address or no token. Close it, or use it as a context.
    """

    def __init__(self, url: str, token: str | None = None, answer_timeout: float = 60.0) -> None:
        if urlsplit(url).scheme not in ("ws", "wss") or not urlsplit(url).hostname:
            raise ValueError(f"url is {url!r}: give ws://host:port, or wss://host:port")
        self.url, self.answer_timeout = url, answer_timeout
        self.metadata: dict[str, Any] | None = None
        self.problem = "it has not been tried yet"
        self.news = threading.Event()
        self._headers = {"Authorization": f"Api-Key {checked_token(token, 'token')}"} if token else None
        self._refused: Refused | None = None
        self._delay = FIRST_DELAY
        self._requests: asyncio.Queue[tuple[bytes, Future[Answer]]] = asyncio.Queue()
        self._open: set[Future[Answer]] = set()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._stay_connected())
        self._thread = threading.Thread(target=self._run, name="pi05-connection", daemon=True)
        self._thread.start()

    def ask(self, message: bytes) -> Future[Answer]:
        """Send a packed observation; does not wait. One at a time: ask again when the last one is done.

        The future holds an `Answer`, or ServerError, or Lost.
        """
        future: Future[Answer] = Future()
        self._loop.call_soon_threadsafe(self._accept, message, future)
        return future

    def refusal(self) -> Refused | None:
        """Why the server did not let it in since this was last asked."""
        refused, self._refused = self._refused, None
        return refused

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(OPEN_TIMEOUT)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- in the thread

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    def _accept(self, message: bytes, future: Future[Answer]) -> None:
        if self.metadata is None:
            future.set_exception(Lost(self.problem))
            self.news.set()
        else:
            self._open.add(future)
            self._requests.put_nowait((message, future))

    async def _stay_connected(self) -> None:
        while True:
            try:
                await self._converse()
            except InvalidStatus as error:
                self._rejected(error)
            except ConnectionClosed as error:
                self._failed(str(error))
                if error.rcvd is not None and error.rcvd.code == TOO_BIG:
                    self._fail_open(ServerError(f"the observation is too large: {error.rcvd.reason}"))
            except Exception as error:  # whatever it is, a robot's connection is tried again
                expected = isinstance(error, OSError | WebSocketException | asyncio.TimeoutError | ServerError)
                self._failed(f"{type(error).__name__}: {error}", exc_info=not expected)
            finally:
                self._disconnected()
            await asyncio.sleep(self._delay * random.uniform(0.5, 1))  # a fleet does not come back all at once
            self._delay = min(MAX_DELAY, 2 * self._delay)

    async def _converse(self) -> None:
        """Connect, and send and receive until the connection is lost, which raises."""
        async with connect(
            self.url,
            additional_headers=self._headers,
            compression=None,
            max_size=None,
            proxy=None,
            open_timeout=OPEN_TIMEOUT,
            ping_interval=PING_INTERVAL,
            ping_timeout=max(PING_TIMEOUT, self.answer_timeout),  # openpi's server answers none while it computes
            close_timeout=1.0,
        ) as socket:
            metadata = _unpacked(await asyncio.wait_for(socket.recv(), OPEN_TIMEOUT))
            log.info("connected to %s", self.url)
            self.metadata = metadata
            self.news.set()
            incoming = asyncio.ensure_future(socket.recv())
            waiting = asyncio.ensure_future(self._requests.get())
            try:
                while True:
                    await asyncio.wait({incoming, waiting}, return_when=asyncio.FIRST_COMPLETED)
                    if incoming.done():  # unasked for, or the connection is closed, which raises
                        log.warning("%s says, unasked: %.500r", self.url, incoming.result())
                        incoming = asyncio.ensure_future(socket.recv())
                        continue
                    message, future = waiting.result()
                    start = monotonic()
                    self._answered(future, await self._answer(socket, message, incoming), monotonic() - start)
                    incoming = asyncio.ensure_future(socket.recv())
                    waiting = asyncio.ensure_future(self._requests.get())
            except (Lost, asyncio.CancelledError):
                if socket.transport.get_write_buffer_size():  # to close would wait until the server reads that
                    socket.transport.abort()
                await socket.close()
                raise
            finally:
                waiting.cancel()
                if not incoming.cancel() and not incoming.cancelled():
                    incoming.exception()  # it is said by what failed first

    async def _answer(
        self, socket: ClientConnection, message: bytes, incoming: asyncio.Future[str | bytes]
    ) -> str | bytes:
        async def asked() -> str | bytes:
            await socket.send(message)  # waits while the server reads nothing
            await asyncio.wait({incoming})  # which may be ended here without ending `incoming`
            return incoming.result()

        answer = asyncio.ensure_future(asked())
        try:
            # before 3.12 wait_for can lose a cancel, and 3.10 has no asyncio.timeout
            done, _ = await asyncio.wait({answer}, timeout=self.answer_timeout)
            if not done:
                raise Lost(f"no answer within {self.answer_timeout:g} s; answer_timeout allows longer ones")
            return answer.result()
        finally:
            answer.cancel()

    def _answered(self, future: Future[Answer], data: str | bytes, seconds: float) -> None:
        self._open.discard(future)
        self._delay = FIRST_DELAY
        try:
            future.set_result(Answer(_unpacked(data), seconds))
        except ServerError as error:
            future.set_exception(error)
        self.news.set()

    def _rejected(self, error: InvalidStatus) -> None:
        status, body = error.response.status_code, error.response.body or b""
        problem = f"{self.url} answers HTTP {status}: {body.decode(errors='replace').strip()[:500]}"
        if 400 <= status < 500 and status not in TRY_AGAIN:
            hint = " (give the token that the server was started with)" if status == 401 else ""
            self._refused = Refused(problem + hint)
            self._delay = MAX_DELAY
        self._failed(problem)

    def _failed(self, problem: str, exc_info: bool = False) -> None:
        if problem != self.problem:
            log.warning("no connection to %s, trying again: %s", self.url, problem, exc_info=exc_info)
        self.problem = problem

    def _disconnected(self) -> None:
        self.metadata = None
        self._requests = asyncio.Queue()
        self._fail_open(Lost(self.problem))
        self.news.set()

    def _fail_open(self, error: Exception) -> None:
        for future in self._open:
            future.set_exception(error)
        self._open.clear()


def _unpacked(data: str | bytes) -> dict[str, Any]:
    """A message's dictionary. Raises ServerError for text, which is what went wrong, and for anything else."""
    if isinstance(data, str):
        raise Busy(data) if data.startswith(f"{BUSY}:") else ServerError(data)
    try:
        message = unpack(data)
    except ValueError as error:
        raise ServerError(f"what came is no answer: {error}") from error
    if not isinstance(message, dict):
        raise ServerError(f"what came is no answer but a {type(message).__name__}")
    return message
