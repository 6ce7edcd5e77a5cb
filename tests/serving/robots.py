"""Several robots in a process of its own: `python robots.py ADDRESS EXPECTED FIRST COUNT REQUESTS`.

Each asks as fast as it is answered, and compares every answer with row `number` of EXPECTED, a .npy f32[robots T A].
The process writes how many requests were answered, and how many of them wrongly.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
from websockets.asyncio.client import connect

from pi05_lightning.serving.wire import pack, unpack


def observation(number: int) -> dict[str, Any]:
    """What robot `number` sees, always."""
    rng = np.random.default_rng(number)
    return {
        "observation/top": rng.integers(0, 256, (48, 64, 3), np.uint8),
        "observation/wrist": rng.integers(0, 256, (48, 64, 3), np.uint8),
        "observation/state": rng.uniform(-1, 1, 4),
        "prompt": ("open the drawer", "close the drawer")[number % 2],
    }


async def robot(address: str, number: int, expected: np.ndarray, requests: int) -> int:
    """How many answers were wrong."""
    message, wrong = pack(observation(number)), 0
    async with connect(f"ws://{address}", compression=None) as client:
        await client.recv()
        for _ in range(requests):
            await client.send(message)
            answer = await client.recv()
            right = isinstance(answer, bytes) and np.allclose(unpack(answer)["actions"], expected, rtol=1e-4, atol=1e-5)
            wrong += not right
    return wrong


async def main(address: str, file: str, first: int, count: int, requests: int) -> None:
    expected = np.load(file)
    robots = (robot(address, number, expected[number], requests) for number in range(first, first + count))
    print(count * requests, sum(await asyncio.gather(*robots)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
