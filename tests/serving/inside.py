"""A policy server in the test's own event loop, and openpi's messages for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from aiohttp.test_utils import TestServer

from pi05_lightning import Pi05Policy
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.server import PolicyServer
from pi05_lightning.serving.wire import pack

PICTURE = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
OBSERVATION = {
    "observation/top": PICTURE,
    "observation/wrist": PICTURE,
    "observation/state": np.zeros(4),
    "prompt": "open the drawer",
}
MESSAGE = pack(OBSERVATION)


@asynccontextmanager
async def served_inside(policy: Pi05Policy, **options: Any) -> AsyncIterator[tuple[PolicyServer, str]]:
    """The server, and the `host:port` that it listens at."""
    server = PolicyServer(policy, Reader(policy.processor.cameras, {}, None), **options)
    async with TestServer(server.app()) as address:
        yield server, f"{address.host}:{address.port}"


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Raises TimeoutError when it does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def count(server: PolicyServer, name: str, **labels: str) -> float:
    """A number of the server's metrics."""
    value = server.metrics.registry.get_sample_value(name, labels)
    assert value is not None, f"no {name} of {labels}"
    return value
