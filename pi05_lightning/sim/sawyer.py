"""MetaWorld's arm: what an environment with it does in whichever scene it stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from pi05_lightning.sim.rendering import Cameras
from pi05_lightning.types import Box, Frame

CONTROL_HZ = 80
"""Control steps per second: 5 MuJoCo steps of 2.5 ms each."""


class Sawyer(ABC):
    """A scene with the arm, at one task. Close it before the interpreter exits, or use it as a context.

    task           its name
    cameras        names of those that it is seen with
    action_repeat  control steps that one `step` lasts
    """

    task: str
    cameras: tuple[str, ...]
    action_repeat: int
    ended = False  # an episode goes on for as long as the caller likes
    action_low, action_high = np.full(4, -1.0), np.full(4, 1.0)
    _views: Cameras

    # --- what a scene has of its own

    @property
    @abstractmethod
    def _data(self) -> Any:
        """MuJoCo's."""

    @property
    @abstractmethod
    def _fingertips(self) -> np.ndarray:
        """Where the gripper closes, f64[3] in metres."""

    @property
    @abstractmethod
    def sentence(self) -> str:
        """The instruction."""

    @property
    @abstractmethod
    def state(self) -> np.ndarray:
        """f32[4]: hand position in metres, gripper opening in [0, 1]."""

    @property
    @abstractmethod
    def workspace(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest place the hand can be sent to: f64[3] in metres, twice."""

    @abstractmethod
    def control_step(self, action: np.ndarray) -> bool:
        """One control step of 1/80 s; returns whether the task is solved."""

    @abstractmethod
    def expert_action(self) -> np.ndarray:
        """What the scripted expert does now, for one control step: f32[4] in [-1, 1]."""

    @abstractmethod
    def place_hand(self, position: np.ndarray, effort: float) -> None:
        """Bring the hand near `position` f64[3] in metres at once, not as a robot would: for pictures of it there."""

    # --- what follows from it

    @property
    def fps(self) -> float:
        """Actions per second."""
        return CONTROL_HZ / self.action_repeat

    def step(self, action: np.ndarray) -> bool:
        """Hold `action` f32[4] (dx, dy, dz, gripper effort, clipped to [-1, 1]) for `action_repeat` control steps.

        Returns whether the task succeeded in one of them.
        """
        successes = [self.control_step(action) for _ in range(self.action_repeat)]
        return any(successes)

    def push(self, offset: np.ndarray) -> None:
        """Displace the hand by `offset` f64[3] in metres (x to the right, y away from the robot), within its reach."""
        self.place_hand(np.clip(self.state[:3] + offset, *self.workspace), float(self._data.ctrl[0]))

    def observation(self) -> Frame:
        """What a policy may see: images, the instruction and `state`."""
        return Frame(images=self.render(), task=self.sentence, state=self.state)

    def render(self, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """{camera: uint8[3 h w]}."""
        return self._views.images(self._data, cameras or self.cameras)

    def picture(self, size: int) -> np.ndarray:
        """What the first camera sees: uint8[3 size size]."""
        return self._views.picture(self._data, self.cameras[0], size)

    def boxes(self, cameras: Sequence[str] | None = None) -> dict[str, dict[str, Box]]:
        """{camera: {object: (ymin, xmin, ymax, xmax) in [0, 1]}} of what is visible."""
        return self._views.boxes(self._data, cameras or self.cameras)

    def positions(self) -> dict[str, np.ndarray]:
        """Where the things and the gripper are: f64[3] in metres, x to the right and y away from the robot."""
        return self._views.positions(self._data) | {"gripper": self._fingertips}

    def close(self) -> None:
        """Free the renderer; without it EGL complains when the interpreter exits."""
        self._views.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
