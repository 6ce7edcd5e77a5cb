"""Chunks of many robots of one policy, computed together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.acting.inference import Computed, Inference, PrefixActions
from pi05_lightning.data.fast import NO_CHUNK, FastDecodeError
from pi05_lightning.types import Frame


class RobotInference(Inference, ABC):
    """Inference for one robot: with its subtask, and the chunks of its episode so far."""

    subtask: str | None
    chunks_begun: int

    @abstractmethod
    def follow(self, frame: Frame) -> None:
        """Forget queue and subtask where the task is another one than that of the last observation."""


@dataclass(frozen=True)
class Request:
    """A chunk that a policy is asked for: read and checked.  start: f32[1 horizon D] of the flow, if given."""

    policy: RobotInference
    frame: Frame
    start: Tensor | None = None
    given: PrefixActions | None = None


@dataclass
class ChunkResults:
    """For each request its chunk f32[T A] in the robot's units, or why there is none; and how long computing took."""

    chunks: list[np.ndarray | Exception]
    subtask_seconds: float
    chunk_seconds: float

    def of(self, place: int) -> np.ndarray:
        """The chunk of a request. Raises what it failed with."""
        chunk = self.chunks[place]
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


def predict_together(requests: Sequence[Request]) -> ChunkResults:
    """Chunks of sessions of one policy, each asked once: each answer is what it would be alone, up to rounding.

    A mistake is its own session's. If computing together fails, each is computed by itself.
    """
    begun = perf_counter()
    for request in requests:
        request.policy.follow(request.frame)
    replanning = [request for request in requests if request.policy.replans(request.policy.chunks_begun)]
    failed: dict[int, Exception] = {}
    subtasks = _of_each(_subtasks, replanning)
    for request, said in zip(replanning, subtasks, strict=True):
        if isinstance(said, Exception):
            failed[id(request)] = said
        else:
            request.policy.subtask = said
    going_on = [request for request in requests if id(request) not in failed]
    for request in going_on:
        request.policy.chunks_begun += 1
    said_at = perf_counter()
    chunks = dict(zip(map(id, going_on), _of_each(_chunks, going_on), strict=True)) | failed
    return ChunkResults([chunks[id(request)] for request in requests], said_at - begun, perf_counter() - said_at)


def _of_each[T](compute: Callable[[Sequence[Request]], list[T]], requests: Sequence[Request]) -> list[T | Exception]:
    """What is computed together; if that fails, what is computed of each, or why it cannot be."""
    if not requests:
        return []
    states = [request.policy.generator.get_state() for request in requests]
    try:
        return [*compute(requests)]
    except Exception as error:
        if len(requests) == 1:
            return [error]
        for request, state in zip(requests, states, strict=True):
            request.policy.generator.set_state(state)
        return [result for request in requests for result in _of_each(compute, [request])]


def _subtasks(requests: Sequence[Request]) -> list[str]:
    return requests[0].policy.say([r.frame for r in requests], [r.policy.generator for r in requests])


def _chunks(requests: Sequence[Request]) -> list[np.ndarray | Exception]:
    drawn = [r.policy.start(None, 1) if r.start is None else r.start for r in requests]
    starts = [start for start in drawn if start is not None]
    computed = requests[0].policy.compute(
        [r.frame for r in requests],
        [r.policy.subtask for r in requests],
        torch.cat(starts) if starts else None,
        [r.given for r in requests],
        [r.policy.generator for r in requests],
    )
    return [_finished(request, row) for request, row in zip(requests, computed, strict=True)]


def _finished(request: Request, computed: Computed) -> np.ndarray | Exception:
    try:
        chunk = request.policy.finish(computed, request.frame, request.given)
    except ValueError as error:
        return error
    if np.isnan(chunk).any():
        return FastDecodeError(NO_CHUNK)
    return chunk
