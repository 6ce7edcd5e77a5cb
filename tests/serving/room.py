"""A room with two tasks in it and a cellar with one, for a policy of two cameras, four state and two action dims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi05_lightning.sim.environment import EnvironmentConfig, View
from pi05_lightning.types import Frame

SENTENCES = {"left": "go to the left", "right": "go to the right", "deep": "go down"}
ROOMS = {"left": "room", "right": "room", "deep": "cellar"}


@dataclass(frozen=True)
class Room(EnvironmentConfig):
    """breaks: an action on which the simulator raises.  ends: one after which the environment ends the episode.

    unsaid: a task whose instruction its room alone can tell.
    """

    breaks: int | None = None
    ends: int | None = None
    unsaid: str | None = None

    def tasks(self, robot: object) -> list[str]:
        return list(SENTENCES)

    def sentences(self, task: str) -> Sequence[str]:
        return () if task == self.unsaid else (SENTENCES[task], f"{SENTENCES[task]}, please")

    def open(self, task: str, view: View) -> RoomEnvironment:
        return RoomEnvironment(task, view.fps, self.breaks, self.ends)


class RoomEnvironment:
    """A place that actions move, of which the state tells; the instruction is done half a metre to its side."""

    max_seconds = 2.0
    action_low, action_high = np.array([-np.inf, -1.0]), np.array([np.inf, 1.0])

    def __init__(self, task: str, fps: float, breaks: int | None, ends: int | None) -> None:
        self.task, self.told, self.fps, self.breaks, self.ends = task, task, fps, breaks, ends

    def reset(self, seed: int) -> None:
        self.at, self.steps = np.random.default_rng(seed).uniform(-0.1, 0.1, 2), 0
        self.instruct(self.task)

    def instruct(self, task: str) -> bool:
        if ROOMS[task] == ROOMS[self.task]:
            self.told = task
        return ROOMS[task] == ROOMS[self.task]

    @property
    def ended(self) -> bool:
        return self.steps == self.ends

    @property
    def sentence(self) -> str:
        return SENTENCES[self.told]

    def observation(self) -> Frame:
        shade = int(100 + 100 * np.clip(self.at[0], -1, 1))
        images = {camera: np.full((3, 48, 64), shade, np.uint8) for camera in ("top", "wrist")}
        return Frame(images, task=self.sentence, state=np.array([*self.at, 0, 0], np.float32))

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        if self.steps == self.breaks:
            raise RuntimeError("the floor gave way")
        self.at = self.at + 0.05 * np.tanh(action)
        return bool(self.at[0] < -0.5 if self.told == "left" else self.at[0] > 0.5)

    def push(self, offset: np.ndarray) -> None:
        self.at = self.at + offset[:2]

    def close(self) -> None: ...
