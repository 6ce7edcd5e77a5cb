"""The rate that a device reaches at best, and how to wait for it: what measured work is a share of."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

START = {"cpu": 768}  # on one core a larger product takes seconds of every start
LARGEST = {"cpu": 6144, "cuda": 8192}
LONG = 0.02  # seconds of a product beside which starting it, and its threads, takes no time
REPEATS = 7  # products of one size at most, after one to warm up
ENOUGH = 0.3  # seconds of products of one size


def peak_rate(dtypes: Iterable[torch.dtype], device: torch.device | str = "cpu") -> float:
    """FLOP/s that a device reaches at best in any of several types, as mixed precision computes in more than one."""
    return max(matmul_rate(dtype, device) for dtype in set(dtypes))


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int | None = None) -> float:
    """FLOP/s of a plain square matrix product at best; draws no random numbers.

    The fastest of a few counts: whatever else runs on the machine only makes a product slower.

    size: rows of the matrices; by default several, until a product takes long enough for all cores to take part.
    """
    device = torch.device(device)
    largest = size or LARGEST.get(device.type, 4096)
    size = size or START.get(device.type, largest)
    rate = 0.0
    while True:
        seconds = _fastest_product(dtype, device, size)
        rate = max(rate, 2 * size**3 / seconds)
        if seconds > LONG or 2 * size > largest:
            return rate
        size *= 2


def _fastest_product(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Seconds of the fastest of a few products, after one to warm up."""
    a = torch.linspace(-1, 1, size, device=device).to(dtype).repeat(size, 1)
    seconds = list[float]()
    while len(seconds) <= REPEATS and (len(seconds) < 2 or sum(seconds) < ENOUGH):
        wait_for(device)
        start = time.perf_counter()
        a @ a
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given; the CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
