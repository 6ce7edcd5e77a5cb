"""Listening at an address until a signal comes, and leaving without breaking what clients wait for."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from aiohttp import web

from pi05_lightning.serving.server import PolicyServer

logger = logging.getLogger(__name__)


async def listen(server: PolicyServer, host: str, port: int, drain_timeout: float) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then answer what waits, for `drain_timeout` seconds at most, and exit with 0.

    A second signal ends the process at once. Raises OSError as `check_address`.
    """
    patience = server.limits.client_timeout  # also for a request that is never finished
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=1.0, keepalive_timeout=patience)
    await runner.setup()
    try:
        with _explained(host, port):
            await web.TCPSite(runner, host, port).start()
        address, bound = runner.addresses[0][:2]
        logger.info("serving at ws://%s:%d", f"[{address}]" if ":" in address else address, bound)
        await _signalled()
        logger.info("stopping within %g s, when all that is asked is answered; a second signal ends it", drain_timeout)
        if not await server.drain(drain_timeout):
            logger.warning("stopped after %g s (--drain_timeout), before all was answered", drain_timeout)
    finally:
        await runner.cleanup()
    logging.shutdown()
    os._exit(0)  # what is still computed, for a client that left, cannot be ended, and Python would wait for it


async def _signalled() -> None:
    """Return at the first SIGTERM or SIGINT, from when on they end the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)


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
