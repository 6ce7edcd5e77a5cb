"""Requests of many clients, answered together by the one thread that owns the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from pi05_lightning.acting.together import ChunkResults, Request, predict_together
from pi05_lightning.files.ranges import check_range
from pi05_lightning.policy import Pi05Policy


@dataclass(frozen=True)
class Batching:
    """How requests are answered together. Raises ValueError for what cannot be."""

    max_batch: int = 32
    """Requests that are answered together at most."""
    batch_wait: float = 0.03
    """Seconds that requests wait at most, when the model is free, for clients who asked again as soon last time; never
    longer than computing took last."""
    max_waiting: int = 256
    """Requests that may wait; one more is refused."""

    def __post_init__(self) -> None:
        check_range("max_batch", self.max_batch, 1)
        check_range("max_waiting", self.max_waiting, 1)
        check_range("batch_wait", self.batch_wait, 0)


class Busy(RuntimeError):
    """As many requests wait as may."""


@dataclass(frozen=True)
class ComputedBatch:
    """What was computed together, for whoever measures: seconds that each request waited, and that computing took."""

    waited: tuple[float, ...]
    subtask_seconds: float
    chunk_seconds: float


class Client:
    """A connection: its policy, and when it can be expected to ask again.

    pause: seconds from its last answer to its next request, as they were last time.
    """

    def __init__(self, policy: Pi05Policy) -> None:
        self.policy = policy
        self.answered_at: float | None = None
        self.pause: float | None = None

    def asks(self, now: float) -> None:
        self.pause = None if self.answered_at is None else now - self.answered_at
        self.answered_at = None

    def is_expected(self, now: float, wait: float) -> bool:
        """Whether it asks within `wait`, or is no later than that, if it pauses as long as last time."""
        if self.answered_at is None or self.pause is None:
            return False
        return abs(self.answered_at + self.pause - now) <= wait


@dataclass(frozen=True)
class Answer:
    """What a client gets: a chunk f32[T A] and the subtask it is for; how long it waited, and what it was part of."""

    chunk: np.ndarray
    subtask: str | None
    waited: float
    batch: ComputedBatch


@dataclass(frozen=True)
class Waiting:
    """A request that was read, since when it waits, and its answer to be."""

    client: Client
    request: Request
    since: float
    answer: asyncio.Future[Answer]


class Batches:
    """Answers the requests that wait together, once `run` runs.

    A batch is taken when the model is free. It waits for more requests only while other clients can be expected.

    read: makes a message of a client's policy a request, and raises what is wrong with it; other threads call it, so
    that the model's always has its next batch.  on_batch: told of every batch.
    waiting: requests that wait.
    """

    def __init__(
        self,
        read: Callable[[Pi05Policy, bytes], Request],
        batching: Batching,
        on_batch: Callable[[ComputedBatch], None] | None = None,
    ) -> None:
        self.read, self.batching, self.on_batch = read, batching, on_batch
        self._took = 0.0
        self._queue: deque[Waiting] = deque()
        self._clients: set[Client] = set()
        self._reading = 0
        self._news = asyncio.Event()
        self._model = ThreadPoolExecutor(1, "model")

    @property
    def waiting(self) -> int:
        return self._reading + sum(not waiting.answer.done() for waiting in self._queue)

    @contextmanager
    def client(self, policy: Pi05Policy) -> Iterator[Client]:
        """A connection, while it lasts."""
        client = Client(policy)
        self._clients.add(client)
        try:
            yield client
        finally:
            self._clients.remove(client)
            self._news.set()

    async def answer(self, client: Client, data: bytes) -> Answer:
        """The answer to a message. Cancelled, the request is dropped.

        Raises what `read` does, Busy where too many wait, and what computing raises.
        """
        if self.waiting >= self.batching.max_waiting:
            raise Busy(f"{self.waiting} requests wait, as many as may: ask again, or serve with more --max_waiting")
        loop = asyncio.get_running_loop()
        since = loop.time()
        client.asks(since)
        self._reading += 1
        try:
            request = await asyncio.to_thread(self.read, client.policy, data)
        except Exception:
            client.answered_at = loop.time()
            raise
        finally:
            self._reading -= 1
            self._news.set()
        waiting = Waiting(client, request, since, loop.create_future())
        self._queue.append(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Compute what waits, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            start = loop.time()
            requests = [waiting.request for waiting in batch]
            try:
                results = await loop.run_in_executor(self._model, predict_together, requests)
            except Exception as error:
                results = ChunkResults([error] * len(batch), 0.0, 0.0)
            now = loop.time()
            self._took = now - start
            done = ComputedBatch(tuple(start - w.since for w in batch), results.subtask_seconds, results.chunk_seconds)
            for waiting, chunk in zip(batch, results.chunks, strict=True):
                waiting.client.answered_at = now
                if waiting.answer.done():
                    continue
                if isinstance(chunk, Exception):
                    waiting.answer.set_exception(chunk)
                else:
                    subtask = waiting.request.policy.subtask
                    waiting.answer.set_result(Answer(chunk, subtask, start - waiting.since, done))
            if self.on_batch:
                self.on_batch(done)

    async def _next(self) -> list[Waiting]:
        loop = asyncio.get_running_loop()
        while not self._pruned():
            await self._more()
        free, wait = loop.time(), min(self.batching.batch_wait, self._took)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(free + wait):
                while self._pruned() < self.batching.max_batch and self._expects(free, wait):
                    await self._more()
        return [self._queue.popleft() for _ in range(min(self._pruned(), self.batching.max_batch))]

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _pruned(self) -> int:
        """How many wait: the queue is put in the order in which they came, without those whose client left."""
        staying = (waiting for waiting in self._queue if not waiting.answer.done())
        self._queue = deque(sorted(staying, key=lambda waiting: waiting.since))
        return len(self._queue)

    def _expects(self, now: float, wait: float) -> bool:
        return self._reading > 0 or any(client.is_expected(now, wait) for client in self._clients)
