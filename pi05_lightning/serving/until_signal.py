"""Serving until a signal comes, and leaving without breaking what clients wait for."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress
from typing import NoReturn, Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


class Server(Protocol):
    """What serves, and answers what waits before it leaves."""

    async def run(self, host: str, port: int) -> None: ...
    async def drain(self, seconds: float) -> bool: ...


async def serve_until_signal(server: Server, host: str, port: int, drain_timeout: float) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then answer what waits, for `drain_timeout` seconds at most, and exit with 0.

    A second signal ends the process at once. Raises OSError as `check_address`.
    """
    serving, stop = asyncio.create_task(server.run(host, port)), asyncio.create_task(_signalled())
    await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    log.info("stopping within %g s, when all that is asked is answered; a second signal ends it", drain_timeout)
    if not await server.drain(drain_timeout):
        log.warning("stopped after %g s (--drain_timeout), before all was answered", drain_timeout)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    logging.shutdown()
    os._exit(0)  # what is still computed, for a client that left, cannot be ended, and Python would wait for it


async def _signalled() -> None:
    """Return at the first signal, from when on they end the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    for number in SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
