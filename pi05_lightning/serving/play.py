"""A page on which a policy is played with: static files, and a websocket with what happens and what is to be done.

Everybody who looks sees the same robot. The server says {"scene": …} first, then {"state": …} whenever something
changed, or {"unshown": why}; a client that is too slow misses states, and waits for none. A client says {"do": …, …},
see `COMMANDS`, and is answered {"done": …} or {"error": …}.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from pi05_lightning.serving.access import Access
from pi05_lightning.serving.address import listen
from pi05_lightning.serving.connection import abort
from pi05_lightning.serving.failures import printable
from pi05_lightning.serving.limits import Limits
from pi05_lightning.sim.session import Session, State

PAGE = Path(__file__).with_name("page")
MAX_REASON = 123  # bytes of why a WebSocket is closed (RFC 6455, 5.5)
LIMITS = Limits(max_message_bytes=8192, max_clients=16)
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
COMMANDS: dict[str, dict[str, type]] = {
    "tell": {"text": str, "stay": bool, "task": str},
    "reset": {"number": int, "task": str, "anew": bool},
    "pause": {"on": bool},
    "step": {},
    "set_speed": {"value": float},
    "push": {"way": str},
    "ask": {"text": str},
}
"""Methods of `Session`, and the types of their arguments."""

log = logging.getLogger(__name__)


def command(session: Session, text: str) -> tuple[str, Callable[[], None]]:
    """What a client says is to be done, and how. Raises ValueError for what is no command."""
    try:
        said = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"that is no JSON: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("do"), str) or said["do"] not in COMMANDS:
        raise ValueError(f'a command is {{"do": …}} with one of {", ".join(COMMANDS)}')
    name = said.pop("do")
    types = COMMANDS[name]
    for key, value in said.items():
        if key not in types:
            raise ValueError(f"{name} has no {key!r}, only {', '.join(types) or 'itself'}")
        number = types[key] is float and type(value) is int
        if type(value) is not types[key] and not number:
            raise ValueError(f"{name}: {key} is {json.dumps(value)}, and must be of type {types[key].__name__}")
    method = getattr(session, name)
    try:
        signature(method).bind(**said)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    return name, partial(method, **said)


class PlayServer:
    """The page, and the websocket behind it, of one session.

    open_session: makes it, given what it tells every new state, or why there is none to show.  access: who may ask.
    limits: of clients and what they say.
    """

    def __init__(
        self,
        open_session: Callable[[Callable[[State | Exception], None]], Session],
        access: Access,
        limits: Limits = LIMITS,
    ) -> None:
        self.access, self.limits = access, limits
        self.session = open_session(self._changed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = ""
        self._news: set[asyncio.Event] = set()  # of every client
        self._clients: set[web.WebSocketResponse] = set()

    def _changed(self, state: State | Exception) -> None:
        """In the session's thread."""
        if isinstance(state, Exception):
            self._state = json.dumps({"unshown": f"what happens cannot be shown: {type(state).__name__}: {state}"})
        else:
            self._state = json.dumps({"state": state})
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # it was closed meanwhile
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for news in self._news:
            news.set()

    async def run(self, host: str, port: int) -> None:
        """Serve until cancelled. Raises OSError as `check_address`."""
        await listen(self.app(), host, port, self.limits.client_timeout, "http")

    async def drain(self, seconds: float) -> bool:
        """Say goodbye; nothing of it takes long."""
        goodbye = [c.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops") for c in self._clients]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*goodbye, return_exceptions=True)
        return True

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._let_in])
        app.router.add_get("/", self._page)
        app.router.add_get("/play", self._client)
        app.router.add_static("/page", PAGE)
        app.on_startup.append(self._begin)
        app.on_response_prepare.append(self._add_headers)
        app.on_shutdown.append(lambda _: self.drain(1.0))
        return app

    async def _begin(self, app: web.Application) -> None:
        self._loop = asyncio.get_running_loop()

    @web.middleware
    async def _let_in(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.access.check(request)
        return await handler(request)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)

    async def _page(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / "index.html")

    async def _client(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(
            heartbeat=self.limits.client_timeout, max_msg_size=self.limits.max_message_bytes, compress=False
        )
        await socket.prepare(request)
        if len(self._clients) >= self.limits.max_clients:
            full = f"{self.limits.max_clients} pages are open already: close one"
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=full.encode())
            return socket
        self._clients.add(socket)
        news = asyncio.Event()
        news.set()
        self._news.add(news)
        telling = asyncio.create_task(self._tell(request, socket, news))
        try:
            async for message in socket:
                answer = await self._answer(message.type, message.data)
                async with asyncio.timeout(self.limits.client_timeout):
                    await socket.send_json(answer)
        except (TimeoutError, ConnectionError):
            abort(request)  # it takes no answers, or left
        finally:
            telling.cancel()
            self._news.discard(news)
            self._clients.discard(socket)
        return socket

    async def _tell(self, request: web.Request, socket: web.WebSocketResponse, news: asyncio.Event) -> None:
        """Send the newest state whenever there is one, until cancelled or the client takes none."""
        try:
            async with asyncio.timeout(self.limits.client_timeout):
                await socket.send_json({"scene": self.session.scene()})
            while True:
                await news.wait()
                news.clear()
                async with asyncio.timeout(self.limits.client_timeout):
                    await socket.send_str(self._state)
        except (TimeoutError, ConnectionError):
            log.warning("%s: takes no messages: its connection is ended", request.remote)
            abort(request)
        except Exception as error:  # a page that hears nothing more must not seem to be connected
            log.exception("what happens in the simulator cannot be told")
            said = f"{type(error).__name__}: {error}".encode()[:MAX_REASON]
            await socket.close(code=WSCloseCode.INTERNAL_ERROR, message=said)

    async def _answer(self, kind: WSMsgType, data: Any) -> dict[str, str]:
        """What came of a command, or what is wrong with it."""
        try:
            if kind is not WSMsgType.TEXT:
                raise ValueError(f"a command is text, not {kind.name.lower()}")
            name, what = command(self.session, data)
            await asyncio.wrap_future(self.session.do(what))
            return {"done": name}
        except Exception as error:  # whatever is wrong is this client's answer, and the server goes on
            if not isinstance(error, ValueError):
                log.warning("a command failed", exc_info=error)
            return {
                "error": printable(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
            }
