"""What a server does, in numbers for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from pi05_lightning.serving.batches import ComputedBatch
from pi05_lightning.serving.failures import KINDS

PARTS = {
    "reading": "checking and reading its message",
    "waiting": "from its message, which is read meanwhile, until it is computed",
    "subtask": "predicting its batch's subtasks",
    "chunk": "sampling its batch's actions",
    "writing": "sending its answer",
}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("pi05_requests", "Observations answered with actions.", registry=self.registry)
        self._failures = Counter("pi05_failures", f"What went wrong. {told(KINDS)}.", ["kind"], registry=self.registry)
        self._seconds = Histogram(
            "pi05_request_seconds",
            f"Seconds of a request. {told(PARTS)}.",
            ["part"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batch_size = Histogram(
            "pi05_batch_size", "Requests computed together.", buckets=SIZES, registry=self.registry
        )
        for kind in KINDS:  # so that they are there before the first
            self._failures.labels(kind)
        for part in PARTS:
            self._seconds.labels(part)

    def watch(self, name: str, meaning: str, value: Callable[[], int]) -> None:
        """A number that is looked up whenever it is asked for."""
        Gauge(f"pi05_{name}", meaning, registry=self.registry).set_function(value)

    def failed(self, kind: str) -> None:
        """Count a failure of one of `KINDS`."""
        self._failures.labels(kind).inc()

    def computed(self, batch: ComputedBatch) -> None:
        """Count a batch, and the seconds of each of its requests."""
        self._batch_size.observe(len(batch.waited))
        for waited in batch.waited:
            self.took("waiting", waited)
            self.took("subtask", batch.subtask_seconds)
            self.took("chunk", batch.chunk_seconds)

    def took(self, part: str, seconds: float) -> None:
        """Count the seconds of one of `PARTS` of a request."""
        self._seconds.labels(part).observe(seconds)

    def page(self) -> web.Response:
        """All of it, in Prometheus' text format."""
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def told(meanings: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items())
