"""A policy's episodes, stepped together so that it sees a batch: from one chunk of actions to the next.

An episode depends on its task, its seed and the policy alone, not on what runs beside it, the batch or the process. A
policy or a simulator that raises ends the episode, and so do actions that cannot be executed; the reason is the
episode's result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from pi05_lightning.data.observation import NotFinite
from pi05_lightning.sim.course import LACKS_MEMORY, REASON_LENGTH, Course
from pi05_lightning.sim.environment import Environment
from pi05_lightning.sim.trials import NOT_FINITE, Clock, Step
from pi05_lightning.types import Frame

if TYPE_CHECKING:
    from pi05_lightning.acting.inference import Inference


class Motion:
    """The actions of an episode, from chunk to chunk: the next one is due every `execution_horizon` actions.

    A chunk is computed from the observation at its first step. Meanwhile the last one goes on, for as many actions as
    the delay says; then the new one is joined at the step that is due. The first chunk is waited for. At another
    instruction, as in a chain, all begins anew, as with `Pi05Policy.predict`.
    """

    def __init__(self, policy: Inference, course: Course) -> None:
        self.executed, self.given = policy.execution_horizon, policy.acting.given
        self.course = course
        self._delays = course.trial.delays or (policy.acting.inference_delay,)
        self.chunk: np.ndarray | None = None
        self.told, self.begun = "", 0
        """The instruction, and the number of its first chunk."""
        self._last: np.ndarray | None = None  # action
        self._origin = 0  # of the last action: the chunk that was computed for it

    @property
    def prefix(self) -> np.ndarray | None:
        """What the next chunk is given, f32[d A]; None of the first."""
        return None if self.chunk is None else self.chunk[self.executed : self.executed + self.given]

    def hear(self, number: int) -> None:
        """What the policy is told before chunk `number`."""
        if self.course.told != self.told:
            self.told, self.begun, self.chunk = self.course.told, number, None

    def follow(self, frame: Frame, chunk: np.ndarray, number: int, clock: Clock) -> None:
        """Execute what is `due` until the episode is over, the instruction another one, or the expert takes over.

        frame: what the chunk was computed from.
        """
        course = self.course
        for executed, (source, at) in enumerate(self.due(chunk, number)):
            if course.trial.keeps:
                now = course.seen() if executed else frame
                course.result.steps.append(Step(now, np.array(source[at], np.float32), course.result.subtask))
            course.take(partial(course.env.step, source[at]), clock, source, at)
            if course.result.over or course.is_stuck() or course.told != self.told:
                break

    def due(self, chunk: np.ndarray, number: int) -> Iterator[tuple[np.ndarray, int]]:
        """What is due from chunk `number` f32[T A], and from the one before until it has come: chunks, places in them.

        An action is taken to be executed when the next one is asked for.
        """
        env, trial, result = self.course.env, self.course.trial, self.course.result
        before, self.chunk, delay, begin = self.chunk, chunk, 0, 0
        if before is not None:
            delay = int(np.random.default_rng([*trial.draws, number]).choice(self._delays))
            begin = max(delay, self.given)
        result.inside += jumps(chunk[0 if before is None else self.given :], env)
        for place in range(min(self.executed, len(chunk))):
            source, at = (before, self.executed + place) if before is not None and place < delay else (chunk, place)
            action = source[at]
            origin = number if place >= begin else number - 1
            if self._last is not None and origin != self._origin:
                result.seams += jumps(np.stack([self._last, action]), env)
            self._last, self._origin = action, origin
            yield source, at


def jumps(actions: np.ndarray, env: Environment) -> list[float]:
    """|a_{t+1} - a_t| of consecutive actions f32[N A], as a share of the range of each dim, mean over the dims.

    Dims without a range count in the robot's units.
    """
    width = env.action_high - env.action_low
    scale = np.where(np.isfinite(width) & (width > 0), width, 1.0)
    return np.abs(np.diff(actions, axis=0) / scale).mean(1).tolist()


def run_policy(policy: Inference, courses: Sequence[Course], clock: Clock) -> None:
    """Begin the episodes and step them together until each succeeds, fails or runs out of time."""
    for course in courses:
        with course.simulating():
            course.begin()
    running, number = [Motion(policy, course) for course in courses if not course.result.over], 0
    while running:
        frames = list[Frame]()
        for motion in running:
            with motion.course.simulating():
                frames.append(motion.course.seen())
        running = [motion for motion in running if not motion.course.result.over]
        if not running:
            break
        for motion in running:
            motion.hear(number)
        start = perf_counter()
        chunks = decide(policy, running, frames, number)
        clock.decisions.append(perf_counter() - start)
        clock.lanes.append(len(running))
        for motion, frame, chunk in zip(running, frames, chunks, strict=True):
            course = motion.course
            if isinstance(chunk, str):
                course.result.reason = chunk
            else:
                course.film_decision(frame, chunk, number, motion.executed)
                with course.simulating():
                    motion.follow(frame, chunk, number, clock)
            if course.result.over:
                with course.simulating():
                    course.end_film()
        running = [m for m in running if not m.course.result.over and not m.course.result.corrected]
        number += 1
    for course in courses:
        if course.result.corrected:
            with course.simulating():
                course.correct(clock)


def decide(
    policy: Inference, motions: Sequence[Motion], frames: Sequence[Frame], number: int
) -> list[np.ndarray | str]:
    """For every episode chunk `number` f32[T A], or why there is none; frames: what is `seen` in it.

    When a batch fails, each is asked for by itself: the others go on.
    """
    courses = [motion.course for motion in motions]
    try:
        if due := [place for place, motion in enumerate(motions) if policy.replans(number - motion.begun)]:
            said = policy.predict_subtasks([frames[n] for n in due], _drawn([courses[n] for n in due], number))
            for place, subtask in zip(due, said, strict=True):
                courses[place].result.subtask = subtask
        noise, subtasks = _noise(courses, number, policy), [course.result.subtask for course in courses]
        chunks = policy.predict_chunks(frames, subtasks, noise, _given(policy, motions), _drawn(courses, number))
        if len(chunks) != len(motions):
            raise ValueError(f"{len(chunks)} chunks for {len(motions)} observations")
    except Exception as error:  # whatever a policy raises is the episode's result, and the run goes on
        if len(motions) > 1:
            return [decide(policy, [motion], [frame], number)[0] for motion, frame in zip(motions, frames, strict=True)]
        courses[0].result.lacked_memory = isinstance(error, LACKS_MEMORY)
        if isinstance(error, NotFinite):
            return [NOT_FINITE]
        return [f"the policy raised {type(error).__name__}: {error}".split("\n")[0][:REASON_LENGTH]]
    return [_checked(np.asarray(chunk), course.env) for chunk, course in zip(chunks, courses, strict=True)]


def _given(policy: Inference, motions: Sequence[Motion]) -> list[np.ndarray] | None:
    """What the next chunks are given, f32[d A] each; None where that is nothing."""
    prefixes = [motion.prefix for motion in motions]
    if not policy.acting.given or all(prefix is None for prefix in prefixes):
        return None
    nothing = np.zeros((0, policy.action_dim), np.float32)  # in an episode with a new instruction
    return [nothing if prefix is None else prefix for prefix in prefixes]


def _checked(chunk: np.ndarray, env: Environment) -> np.ndarray | str:
    dims = len(env.action_low)
    if chunk.ndim != 2 or not len(chunk) or chunk.shape[1] != dims:
        return f"the policy's chunk has the shape {chunk.shape}, not (steps, {dims})"
    return chunk if np.isfinite(chunk).all() else NOT_FINITE


def _noise(courses: Sequence[Course], number: int, policy: Inference) -> torch.Tensor:
    """f32[B T D], of each trial and the chunk's number alone."""
    shape = policy.model.config.horizon, policy.model.config.action_dim
    generators = [np.random.default_rng([*course.trial.draws, number]) for course in courses]
    draws = [generator.standard_normal(shape, dtype=np.float32) for generator in generators]
    return policy.acting.noise_scale * torch.from_numpy(np.stack(draws))


def _drawn(courses: Sequence[Course], number: int) -> list[torch.Generator]:
    """What each trial's tokens are drawn with at a temperature, of the trial and the chunk's number alone."""
    seeds = [np.random.SeedSequence([*course.trial.draws, number]) for course in courses]
    return [torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1)) for seed in seeds]
