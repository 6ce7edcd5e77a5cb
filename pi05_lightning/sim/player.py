"""One policy in a simulator, an action at a time: told something else, pushed and asked meanwhile.

It acts as in a rollout: from the same initial states, with the same noise, judged in the same way.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import monotonic

import numpy as np

from pi05_lightning.acting.inference import Inference
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import EnvironmentConfig, Instructed, Pictured, Pushed
from pi05_lightning.sim.motion import Motion, decide
from pi05_lightning.sim.rollout import Lanes, view_of
from pi05_lightning.sim.trials import Clock, Trial
from pi05_lightning.types import BOX, Box, text_to_boxes

PICTURE = 384  # pixels of what people see
HISTORY = 16  # executed actions that are kept
_MEASURED = 20  # calls and actions that times are the median of
PUSH = 0.08  # metres
WAYS: Mapping[str, tuple[int, int, int]] = {
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "away": (0, 1, 0),
    "near": (0, -1, 0),
    "up": (0, 0, 1),
    "down": (0, 0, -1),
}
_WHERE = re.compile(r"where (?:is|are) (.+?)\s*\??", re.IGNORECASE)
_BOXES = re.compile(r"(?:detect|point) ", re.IGNORECASE)


@dataclass(frozen=True)
class Start:
    """Which initial states there are, and how an episode begins in them.

    seeds: of each task's initial states, by their number.  max_seconds, noise_seed: see `Trial`.
    """

    env: EnvironmentConfig
    seeds: Mapping[str, Sequence[int]]
    max_seconds: float | None = None
    noise_seed: int = 0

    def task_of(self, sentence: str, judged: str) -> str | None:
        """The task that a sentence tells, as far as the simulator knows; in any spelling of upper and lower case.

        Of several the one that is judged, else the first.
        """
        tasks = [
            task for task in self.seeds if _words(sentence) in {_words(known) for known in self.env.sentences(task)}
        ]
        return judged if judged in tasks else next(iter(tasks), None)

    def check(self, task: str, number: int) -> None:
        """Raises ValueError for a task, or a number of an initial state, that there is not."""
        if task not in self.seeds:
            raise ValueError(f"there is no task {task!r} here: choose one of {', '.join(self.seeds)}")
        if not 0 <= number < len(self.seeds[task]):
            raise ValueError(f"initial states are numbered from 0 to {len(self.seeds[task]) - 1}, not {number}")


def _words(sentence: str) -> str:
    return " ".join(sentence.split()).casefold()


@dataclass(frozen=True)
class Said:
    """What a policy said about a picture u8[h w 3]: its boxes, and the rest of the text, where points stay tokens."""

    asked: str
    camera: str
    text: str
    boxes: list[Box]
    picture: np.ndarray


class Player:
    """A policy and the environment that it acts in. All of one thread: renderers belong to the one that made them.

    running: whether there is a next action.  due: when, by the monotonic clock.
    course: how the episode goes.  frame: what the policy sees.  chunk, place: the last action's, f32[T A].
    left: actions before the next decision.
    executed: the last actions f32[A], oldest first.  answers: to what was asked last.
    """

    def __init__(self, name: str, policy: Inference, start: Start) -> None:
        self.name, self.policy, self.start = name, policy, start
        self._lanes = Lanes(start.env, view_of(policy))
        policy.inputs.takes_any_task = True
        self.answers: list[Said] = []
        self.version = 0  # of the picture
        self.judged = next(iter(start.seeds))
        self._solved = False  # the judged task, by the last action
        self._counts = True  # whether its success would: it was unsolved at some moment since it was told
        self._sentence: str | None = None  # what it was told; None: the environment's instruction
        self.reset(self.judged, 0)

    # --- what happens

    def reset(self, task: str, number: int, anew: bool = False) -> None:
        """Begin at a numbered initial state of a task, with what it was told where that is judged as this task.

        anew: with the environment's own instruction, whatever it was told.
        ValueError for a task or number that there is not.
        """
        self.start.check(task, number)
        (self.env,) = self._lanes.of(task, 1, self.start.max_seconds)
        self._sentence = self._sentence if task == self.judged and not anew else None
        self.task = self.judged = task
        self._solved, self._counts = False, True
        self.number, self.answers = number, []
        course = self._course()
        course.begin()
        self._begin(course)

    def go_on(self, task: str | None) -> bool:
        """Judge a task from now on in the scene as it is, None: the same as before; returns whether that can be.

        It cannot in another scene, for what was just done, and where the environment ended the episode.
        """
        if self.env.ended:
            return False
        if task is None:
            return True
        if self._solved and task == self.judged:
            return False
        if isinstance(self.env, Instructed) and self.env.instruct(task) and task != self.judged:
            self.judged, self._solved, self._counts = task, False, False  # whether it is solved, a step will tell
        return self.judged == task

    def tell(self, sentence: str) -> None:
        """Give an instruction in the middle of things: what is solved already counts once it was not, meanwhile."""
        self._sentence = sentence
        self._counts &= not self._solved
        course = self._course()
        course.begin_here()
        self._begin(course)

    def _course(self) -> Course:
        seed = self.start.seeds[self.task][self.number]
        trial = Trial("policy", self.task, seed, max_seconds=self.start.max_seconds, noise_seed=self.start.noise_seed)
        return Course(self.env, trial, self._sentence)

    def _begin(self, course: Course) -> None:
        self.course, self.motion, self.clock = course, Motion(self.policy, course), Clock()
        self.chunk: np.ndarray | None = None
        self.place, self.left, self._number = 0, 0, 0
        self._due: Iterator[tuple[np.ndarray, int]] = iter(())
        self.executed: deque[np.ndarray] = deque(maxlen=HISTORY)
        self.measure_anew()
        self._look()

    def measure_anew(self) -> None:
        """From now on: the next action is due at once, and how fast it is does not tell of what was before."""
        self._ends: deque[float] = deque(maxlen=_MEASURED)
        self.due = monotonic()

    def step(self) -> None:
        """The next action, for which a chunk may have to be computed; the episode ends where something raises."""
        try:
            action = next(self._due, None) or self._replan()
            if action is None:
                return
            self.chunk, self.place = action
            self.left -= 1
            took = self.chunk[self.place]
            self.course.take(partial(self._act, took), self.clock)
            self.executed.append(took)
            self._ends.append(monotonic())
            self._look()
        except Exception as error:  # a simulator's own, of which there is no end
            self.course.fail(error)

    def _act(self, action: np.ndarray) -> bool:
        """Take one action; returns whether the judged task is solved, and was not since the instruction was told."""
        self._solved = bool(self.env.step(action))
        success = self._solved and self._counts
        self._counts |= not self._solved
        return success

    def _replan(self) -> tuple[np.ndarray, int] | None:
        start = monotonic()
        (chunk,) = decide(self.policy, [self.motion], [self.frame], self._number)
        self.clock.decisions.append(monotonic() - start)
        if isinstance(chunk, str):
            self.course.result.reason = chunk
            return None
        self._due = self.motion.due(chunk, self._number)
        self._number += 1
        self.left = min(self.motion.executed, len(chunk))
        return next(self._due)

    def push(self, way: str) -> None:
        """Push the arm a few centimetres. ValueError for no way, and where the simulator does not let it be pushed."""
        if way not in WAYS:
            raise ValueError(f"push: {way!r} is no way: choose one of {', '.join(WAYS)}")
        if not isinstance(self.env, Pushed):
            raise ValueError(f"{type(self.start.env).__name__} does not let its arm be pushed")
        self.env.push(PUSH * np.array(WAYS[way]))
        self._look()

    def ask(self, question: str) -> None:
        """Ask about what it sees: for boxes in every camera, else in the first one, as it was trained.

        Where something is, is also asked as PaliGemma is asked for boxes.  ValueError where the policy was not trained
        to answer.
        """
        where = _WHERE.fullmatch(question.strip())
        boxes = f"detect {where[1]}" if where else question if _BOXES.match(question) else None
        self.answers = []
        for place, (camera, image) in enumerate(self.frame.images.items()):
            asked = [question] if where and place == 0 else []
            asked += [boxes] if boxes else [question] if place == 0 else []
            said = "\n".join(self.policy.answer(self.frame, one, camera) for one in asked)
            if asked:
                picture = (image if place else self.picture).transpose(1, 2, 0)
                words = " ".join(BOX.sub(" ", said).split())
                self.answers.append(Said(question, camera, words, text_to_boxes(said), picture))

    def close(self) -> None:
        self._lanes.close()

    # --- what there is to see

    def _look(self) -> None:
        self.frame = self.course.seen()
        self.version += 1

    @property
    def running(self) -> bool:
        return not self.course.result.over

    @property
    def picture(self) -> np.ndarray:
        """What the first camera sees, u8[3 h w], sharper than for the policy where the simulator can; or black."""
        if not self.frame.images:
            return np.zeros((3, PICTURE, PICTURE), np.uint8)
        first = next(iter(self.frame.images.values()))
        return self.env.picture(PICTURE) if isinstance(self.env, Pictured) else first

    @property
    def pushable(self) -> bool:
        return isinstance(self.env, Pushed)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Of actions, f32[A] twice."""
        return self.env.action_low, self.env.action_high

    @property
    def rate(self) -> float | None:
        """Simulated seconds per second, lately."""
        if len(self._ends) < 2 or self._ends[-1] == self._ends[0]:
            return None
        return (len(self._ends) - 1) / self.course.result.fps / (self._ends[-1] - self._ends[0])

    @property
    def milliseconds(self) -> tuple[float | None, float | None]:
        """A call of the policy and an action in the simulator, lately, in the median."""
        parts = (self.clock.decisions[-_MEASURED:], self.clock.steps[-_MEASURED:])
        policy, simulator = (1e3 * median(part) if part else None for part in parts)
        return policy, simulator
