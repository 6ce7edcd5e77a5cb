"""Actions with their time stamps: which one is due at a step, of the newest chunk that has come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Due:
    """An action f32[A], the step that it is due at, the number of its chunk and its place in that chunk."""

    action: np.ndarray
    step: int
    chunk: int
    place: int


class ActionQueue:
    """Holds for every step to come the action of the newest chunk that has one."""

    def __init__(self) -> None:
        self._due: dict[int, Due] = {}

    def merge(self, chunk: np.ndarray, first: int, now: int, number: int, given: int = 0, blend: int = 0) -> None:
        """Take in a chunk f32[T A], whose action k is due at step `first` + k.

        now: the first step that has not begun; what was due before is too late and left out.
        number: of the chunk.
        given: actions that the chunk was told and begins with; the queue keeps what it has for these steps.
        blend: steps from `now` on over which the actions that there were fade into the new ones.
        """
        for place, action in enumerate(chunk):
            step = first + place
            before = self._due.get(step)
            if step < now or (before is not None and place < given):
                continue
            weight = min(1.0, (step - now + 1) / (blend + 1))
            if before is not None and weight < 1:
                action = (weight * action + (1 - weight) * before.action).astype(action.dtype)
            self._due[step] = Due(action, step, number, place)

    def at(self, step: int) -> Due | None:
        return self._due.get(step)

    def left(self, step: int) -> int:
        """Steps from `step` on, without a gap, that have an action."""
        count = 0
        while step + count in self._due:
            count += 1
        return count

    def upcoming(self, step: int, most: int) -> list[np.ndarray]:
        """The actions of the steps from `step` on: `most` of them, or as many as there are without a gap."""
        return [self._due[step + place].action for place in range(min(most, self.left(step)))]

    def forget(self, before: int) -> None:
        """Forget the steps before one."""
        for step in [step for step in self._due if step < before]:
            del self._due[step]

    def clear(self) -> None:
        self._due.clear()
