"""Addresses that a server can listen at, and what to do about others."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager


async def check_address(host: str, port: int) -> None:
    """Raises OSError when no server can listen there, and ValueError for what is no port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}: give 0, which takes a free one, to 65535")
    with explained(host, port):
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    server.close()
    await server.wait_closed()


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
