"""A robot that counts, driven against a server that counts: what it executes says which answer it is from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import numpy as np

from pi05_lightning.serving.client import Controller, always
from tests.serving.counting import CountingServer

STILL = [-1.0, -1.0]
PERIOD = 0.01  # seconds of a control step, by which 50 Hz are hurried


class Robot:
    """Counts the actions that it executes, and knows those that it got: (action, whether the policy's)."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.position = controller, 0
        self.got: list[tuple[np.ndarray, bool]] = []
        self.longest_step = 0.0

    def see(self) -> dict[str, Any]:
        return {"observation/state": np.array([self.position]), "prompt": "count"}

    def step(self) -> np.ndarray:
        start = monotonic()
        action = self.controller.step(self.see)
        self.longest_step = max(self.longest_step, monotonic() - start)
        due = self.controller.executed
        self.got.append((action, due is not None))
        if due is not None:
            assert action[0] == due.step == self.position
            self.position += 1
        return action

    def run(self, steps: int) -> list[tuple[np.ndarray, bool]]:
        """Step `steps` times; what it got."""
        for _ in range(steps):
            self.step()
            sleep(PERIOD)
        return self.got[-steps:]

    def run_until(self, reached: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = monotonic() + seconds
        while not reached():
            assert monotonic() < deadline, f"it stands at {self.position}: {self.controller.latencies.summary()}"
            self.run(1)

    def run_to(self, position: int) -> None:
        self.run_until(lambda: self.position >= position)

    @property
    def chunks(self) -> list[int]:
        """Of the executed actions."""
        return [int(action[1]) for action, from_policy in self.got if from_policy]


@contextmanager
def driven(server: CountingServer, **options: Any) -> Iterator[Robot]:
    with server.running() as url, Controller(url, always(STILL), **options) as controller:
        controller.connect(10)
        yield Robot(controller)
