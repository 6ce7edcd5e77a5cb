"""A trial on its way in an environment: how it begins, what each action does to it, and what is filmed of it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np
import torch
from PIL import Image

from pi05_lightning.data.images import as_bytes
from pi05_lightning.sim.environment import (
    Chained,
    Demonstrator,
    Environment,
    NoSuchEnvironment,
    SharedScene,
    act_as_expert,
)
from pi05_lightning.sim.trials import ENDED, OUT_OF_TIME, SOLVED_OTHER, Clock, FilmFrame, Result, Step, Trial
from pi05_lightning.types import Frame

log = logging.getLogger(__name__)

REASON_LENGTH = 160  # of the message of whatever a policy or a simulator raised
LACKS_MEMORY = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
MOST_DECISIONS = 96
"""Frames of a film decision by decision; a longer one leaves out every second."""


class Course:
    """One episode.  sentence: what the policy is told; None: the environment's instruction."""

    def __init__(self, env: Environment, trial: Trial, sentence: str | None = None) -> None:
        self.env, self.trial, self.sentence = env, trial, sentence
        self.result = Result(trial)
        self._phase = "", 0
        """What the expert would be doing, and since which action; of a trial with patience."""

    @property
    def told(self) -> str:
        """The instruction that the policy gets."""
        return self.env.sentence if self.sentence is None else self.sentence

    def seen(self) -> Frame:
        """An observation as the policy gets it, with the instruction that it is told."""
        frame = self.env.observation()
        return frame if self.sentence is None else replace(frame, task=self.sentence)

    def begin(self) -> None:
        """Begin at the initial state."""
        self.env.reset(self.trial.seed)
        self.begin_here()
        other = self.trial.other
        if other is not None and isinstance(self.env, SharedScene) and self.env.watch(other):
            self.result.solved_other = False

    def begin_here(self) -> None:
        """Begin in the environment as it is."""
        env, result = self.env, self.result
        result.fps = env.fps
        seconds = env.max_seconds if self.trial.max_seconds is None else self.trial.max_seconds
        result.max_seconds = max(1, round(seconds * env.fps)) / env.fps  # whole actions
        if isinstance(env, Chained):
            result.done, result.length = 0, env.length
        if self.trial.patience is not None:
            self._phase = cast("Demonstrator", env).subtask(), 0

    def take(self, step: Callable[[], bool], clock: Clock, chunk: np.ndarray | None = None, place: int = 0) -> None:
        """One action, in `place` of its chunk, and how the episode goes then.  step: whether it is solved by that."""
        env, result = self.env, self.result
        start = perf_counter()
        result.success = bool(step())  # a simulator may say it as NumPy does
        clock.steps.append(perf_counter() - start)
        result.decisions += 1
        if result.solved_other is not None:
            result.solved_other = bool(cast("SharedScene", env).solved_other)
        if result.done is not None:
            result.done = cast("Chained", env).done
        if not result.success:
            if result.solved_other:
                result.reason = SOLVED_OTHER
            elif env.ended:
                result.reason = ENDED
            elif result.decisions >= round(result.max_seconds * env.fps):
                result.reason = OUT_OF_TIME
        if self.trial.films == "all":
            image, caption = side_by_side(env.observation()), result.subtask or self.told
            result.film.append(FilmFrame(image, caption, chunk, place))

    # --- the simulator fails

    @contextmanager
    def simulating(self) -> Iterator[None]:
        """What the simulator raises here ends the episode, but for what it does not have, and want of memory."""
        try:
            yield
        except (NoSuchEnvironment, *LACKS_MEMORY):
            raise
        except Exception as error:  # a simulator's own, of which there is no end
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the episode, unless it is over, by what its simulator raised: none of its steps is kept.

        The first time that something is raised in a place, its traceback is logged.
        """
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        if (file, line) not in _LOGGED:
            _LOGGED.add((file, line))
            log.warning("%s: the simulator raised", self.trial.title, exc_info=error)
        if not self.result.over:
            said = f"the simulator raised {type(error).__name__}: {error}".split("\n")[0][:REASON_LENGTH]
            self.result.reason = f"{said} ({Path(file).name}:{line})"
            self.result.steps.clear()

    # --- the expert takes over

    def is_stuck(self) -> bool:
        """Whether the expert takes over, as the policy has made no progress for too long."""
        if self.trial.patience is None:
            return False
        now, taken = cast("Demonstrator", self.env).subtask(), self.result.decisions
        if self._phase[0] != now:
            self._phase = now, taken
        self.result.corrected = taken - self._phase[1] >= self.trial.patience
        return self.result.corrected

    def correct(self, clock: Clock) -> None:
        """The expert from where the policy is, until the end."""
        env = cast("Demonstrator", self.env)
        while not self.result.over:
            taken = list[np.ndarray]()
            frame, subtask = (self.seen(), env.subtask()) if self.trial.keeps else (None, None)
            self.take(partial(act_as_expert, env, taken), clock)
            if frame is not None:
                action = np.asarray(np.mean(taken, 0, dtype=np.float32))
                self.result.steps.append(Step(frame, action, subtask, is_correction=True))

    # --- the film of a failure

    def film_decision(self, frame: Frame, chunk: np.ndarray, number: int, executed: int) -> None:
        """What chunk `number` f32[T A] was decided from."""
        if self.trial.films != "failure":
            return
        result = self.result
        if len(result.film) == MOST_DECISIONS:
            del result.film[1::2]
            result.film_every *= 2
        if number == 0:
            result.film_every = executed
        if number * executed % result.film_every == 0:
            result.film.append(FilmFrame(side_by_side(frame), result.subtask or frame.task, chunk))

    def end_film(self) -> None:
        """Keep the film of a failure, with how it ended, and no other."""
        if self.trial.films != "failure":
            return
        result = self.result
        if result.success:
            result.film.clear()
        else:
            result.film.append(FilmFrame(side_by_side(self.env.observation()), result.subtask or self.told))


_LOGGED = set[tuple[str, int | None]]()
"""Files and lines in which simulators raised, in this process."""


def side_by_side(frame: Frame) -> np.ndarray:
    """The cameras' images, as high as the highest, u8[H W 3]; black where a policy sees none."""
    images = [Image.fromarray(as_bytes(image).transpose(1, 2, 0)) for image in frame.images.values()]
    images = images or [Image.new("RGB", (64, 64))]
    height = max(image.height for image in images)
    same = [image.resize((round(image.width * height / image.height), height)) for image in images]
    return np.concatenate([np.asarray(image) for image in same], axis=1)
