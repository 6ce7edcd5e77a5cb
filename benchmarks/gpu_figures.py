"""Where the parts of `benchmarks.gpu` are measured, and the figures that they leave."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.sizes import BASE, DEBUG
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.profiling.accelerators import ACCELERATORS
from pi05_lightning.profiling.rate import wait_for

GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    unit: str
    goal: str = ""
    """`>= 3` or `<= 0.5`; empty where no goal was set."""


@dataclass(frozen=True)
class Place:
    """Where it is measured. quick: debug sizes and few repeats, on whatever device there is."""

    quick: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def config(self) -> ModelConfig:
        return DEBUG if self.quick else BASE

    @property
    def peak(self) -> float | None:
        """The published bf16 rate of this device, FLOP/s, where it is known."""
        return published_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None

    def seconds(self, work: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
        """Median of some calls, each waited for."""
        times = []
        for number in range(2 if self.quick else warm_up + repeats):
            start = time.perf_counter()
            work()
            wait_for(self.device)
            if number >= (1 if self.quick else warm_up):
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def published_peak(name: str) -> float | None:
    """The published bf16 rate, FLOP/s, of a device by its name, as `NVIDIA GeForce RTX 4090`; None of others."""
    words = name.lower().replace(" ", "")
    return next((found.bf16 for key, found in ACCELERATORS.items() if key in words), None)
