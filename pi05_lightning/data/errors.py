"""What goes wrong with data that cannot be trained on, and what is then done about it."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from typing import Literal

OnBadSample = Literal["error", "skip"]

log = logging.getLogger(__name__)


class BadSample(ValueError):
    """Data that must not be trained on; its message names dataset, episode, frame and key, and how to fix it."""


class BadFrame(ValueError):
    """Bad data found where its address is not known; whoever knows it makes a `BadSample` of it."""


class BadImage(BadFrame):
    """An image that cannot be read."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the known name that is nearest to a name or to its last part, or nothing."""
    names, written = list(known), name.replace("-", "_")
    for part in (written, re.split(r"[./]", written)[-1]):
        if nearest := difflib.get_close_matches(part, names, n=1):
            return f" (did you mean {nearest[0]}?)"
    return ""


class Rejects:
    """Bad data of one dataset, found while it is loaded: an error, or left out with a warning and counted."""

    def __init__(self, dataset: str, policy: OnBadSample):
        self.dataset, self.policy = dataset, policy
        self.frames = 0

    def add(self, where: str, problem: str, remedy: str, frames: int) -> None:
        """Record that `frames` frames are bad, the first at `where`; raises BadSample unless they are skipped."""
        message = f"dataset {self.dataset!r}, {where}: {problem}"
        if self.policy == "error":
            raise BadSample(f"{message}. {remedy}, or leave such data out with on_bad_sample: skip")
        self.frames += frames
        log.warning("%s%s", message, f". Left out: {frames} frames" if frames else "")
