"""The rate that a device reaches at best, and how to wait for it: what measured work is a share of."""

from __future__ import annotations

import statistics
import time

import torch

SIZE = {"cpu": 2048, "cuda": 8192}  # large enough that starting the product takes no time beside it


def matmul_rate(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: int | None = None, repeats: int = 7
) -> float:
    """FLOP/s of a plain square matrix product, the median of a few after one to warm up; draws no random numbers.

    size: rows of the matrices; by default enough for the device.
    """
    device = torch.device(device)
    size = size or SIZE.get(device.type, 4096)
    a = torch.linspace(-1, 1, size, device=device).to(dtype).repeat(size, 1)
    seconds = []
    for _ in range(repeats + 1):
        wait_for(device)
        start = time.perf_counter()
        a @ a
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given; the CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
