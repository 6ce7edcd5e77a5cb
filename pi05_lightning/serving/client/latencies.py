"""How long answers take, and what else happens between a robot and its server."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from time import monotonic
from typing import Any

import numpy as np

KEPT = 10_000  # the newest answers that percentiles are over
PERCENTILES = (50, 95, 99)
COUNTS = ("answers", "steps", "fallback_steps", "late", "errors", "lost", "busy")
"""Answers that came, control steps, those of the fallback, answers that came later than the server was told, errors of
the server, answers that a lost connection took along, and requests that the server was too busy for."""

log = logging.getLogger(__name__)


class Latencies:
    """Collects latencies and counts, and logs a line every `log_every` seconds; None logs none.

    counts   of `COUNTS`
    """

    def __init__(self, log_every: float | None) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self._server: deque[float] = deque(maxlen=KEPT)
        self._delays: deque[int] = deque(maxlen=KEPT)
        self._log_every, self._logged = log_every, monotonic()

    def add(self, seconds: float, server_ms: float | None, delay: int) -> None:
        """An answer: seconds from asking on, the server's own milliseconds, the steps that began meanwhile."""
        self.counts["answers"] += 1
        self._seconds.append(seconds)
        self._delays.append(delay)
        if server_ms is not None:
            self._server.append(server_ms)

    def summary(self) -> dict[str, Any]:
        """The counts, and percentiles and maximum of `latency_ms`, the server's part of it, and the delay in steps."""
        return {
            **{name: self.counts[name] for name in COUNTS},
            "latency_ms": _spread(1e3 * seconds for seconds in self._seconds),
            "server_ms": _spread(self._server),
            "delay_steps": _spread(self._delays),
        }

    def log(self) -> None:
        counts, latency = self.counts, _spread(1e3 * seconds for seconds in self._seconds)
        server, delay = _spread(self._server), _spread(self._delays)
        log.info(
            "%d answers: latency %s ms, of which the server %s ms; delay %s steps; %d late; %d of %d steps were the"
            " fallback's; %d errors, %d answers lost, the server busy %d times",
            counts["answers"],
            _said(latency),
            _said(server),
            _said(delay),
            counts["late"],
            counts["fallback_steps"],
            counts["steps"],
            counts["errors"],
            counts["lost"],
            counts["busy"],
        )

    def log_when_due(self) -> None:
        if self._log_every is not None and monotonic() - self._logged >= self._log_every:
            self._logged = monotonic()
            self.log()


def _spread(values: Iterable[float]) -> dict[str, float]:
    found = np.array(list(values), float)
    if not len(found):
        return {}
    named = zip(PERCENTILES, np.percentile(found, PERCENTILES), strict=True)
    return {**{f"p{percent}": round(float(value), 1) for percent, value in named}, "max": round(float(found.max()), 1)}


def _said(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items()) or "unknown"
