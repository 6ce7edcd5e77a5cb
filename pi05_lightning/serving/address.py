"""Addresses that a server can listen at, and what to do about others."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

log = logging.getLogger(__name__)


async def check_address(host: str, port: int) -> None:
    """Raises OSError when no server can listen there, and ValueError for what is no port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}: give 0, which takes a free one, to 65535")
    with explained(host, port):
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    server.close()
    await server.wait_closed()


async def listen(app: web.Application, host: str, port: int, patience: float, scheme: str) -> None:
    """Serve an application until cancelled. Raises OSError as `check_address`.

    patience: seconds, also for a request that is never finished.  scheme: of the address that is logged.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=patience)
    await runner.setup()
    try:
        with explained(host, port):
            await web.TCPSite(runner, host, port).start()
        address, bound = runner.addresses[0][:2]
        log.info("serving at %s://%s:%d", scheme, f"[{address}]" if ":" in address else address, bound)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


@contextmanager
def explained(host: str, port: int) -> Iterator[None]:
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
