"""What goes wrong with data that cannot be trained on, and what is then done about it."""

from __future__ import annotations

import logging
from typing import Literal

OnBadSample = Literal["error", "skip"]

log = logging.getLogger(__name__)


class BadSample(ValueError):
    """Data that must not be trained on; its message names dataset, episode, frame and key, and how to fix it."""


class BadFrame(ValueError):
    """Bad data found where its address is not known; whoever knows it makes a `BadSample` of it."""


class BadImage(BadFrame):
    """An image that cannot be read."""


class Rejects:
    """Bad data of one dataset, found while it is loaded: an error, or left out with a warning and counted."""

    def __init__(self, dataset: str, policy: OnBadSample):
        self.dataset, self.policy = dataset, policy
        self.frames = 0

    def add(self, where: str, problem: str, remedy: str, frames: int, can_skip: bool = True) -> None:
        """Record that `frames` frames are bad, the first at `where`; raises BadSample unless they are skipped.

        can_skip: whether leaving them out mends it.
        """
        message = f"dataset {self.dataset!r}, {where}: {problem}"
        if not can_skip:
            raise BadSample(f"{message}. {remedy}; on_bad_sample: skip does not mend it")
        if self.policy == "error":
            raise BadSample(f"{message}. {remedy}, or leave such data out with on_bad_sample: skip")
        self.frames += frames
        log.warning("%s%s", message, f". Left out: {frames} frames" if frames else "")
