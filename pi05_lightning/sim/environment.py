"""What an environment is to a rollout: one robot at one task, whichever simulator it lives in.

A new simulator is one `EnvironmentConfig`, which YAML and the command line can hold, and one `Environment`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np

from pi05_lightning.sim.splits import split_seeds
from pi05_lightning.types import Box, Frame

if TYPE_CHECKING:  # processes that only simulate need not wait for it
    from pi05_lightning.data.robot import Robot


class NoSuchEnvironment(ValueError):
    """What was asked of a simulator does not exist there: a task, a camera, an option, the simulator itself."""


class Environment(Protocol):
    """One robot at one task. Close it before the interpreter exits: renderers complain otherwise.

    sentence     the instruction
    fps          actions per second of simulated time
    max_seconds  simulated time after which an episode has failed, where the user says nothing else
    action_low, action_high   f64[A]: bounds of an action
    ended        the episode is over, whether it succeeded or not
    """

    @property
    def sentence(self) -> str: ...
    @property
    def fps(self) -> float: ...
    @property
    def max_seconds(self) -> float: ...
    @property
    def action_low(self) -> np.ndarray: ...
    @property
    def action_high(self) -> np.ndarray: ...
    @property
    def ended(self) -> bool: ...

    def reset(self, seed: int) -> None:
        """Begin an episode; the same seed gives the same one, whatever came before."""
        ...

    def observation(self) -> Frame:
        """What a policy may see: images by camera, the instruction, the state in the robot's units."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Take one action f32[A] in the robot's units; returns whether the task is solved."""
        ...

    def close(self) -> None: ...


class Demonstrator(Environment, Protocol):
    """An environment with a scripted expert, which can be recorded with what it does in words, and tells the truth.

    task           its name
    cameras        names of those that it is seen with
    objects        names of what can be asked about
    target         the one that the instruction is about, if it is about one
    action_repeat  control steps that an action lasts
    state          f32[S] of the robot
    workspace      the lowest and the highest place the hand can be sent to: f64[3] in metres, twice
    other_sentences  the instruction in other words, if there are any
    """

    @property
    def task(self) -> str: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def objects(self) -> Sequence[str]: ...
    @property
    def target(self) -> str | None: ...
    @property
    def action_repeat(self) -> int: ...
    @property
    def state(self) -> np.ndarray: ...
    @property
    def workspace(self) -> tuple[np.ndarray, np.ndarray]: ...
    @property
    def other_sentences(self) -> Sequence[str]: ...

    def expert_action(self) -> np.ndarray:
        """What the expert does now, for one control step: f32[A]."""
        ...

    def control_step(self, action: np.ndarray) -> bool:
        """One control step; returns whether the task is solved."""
        ...

    def subtask(self) -> str:
        """What the expert is doing at the moment, in words."""
        ...

    def render(self, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """{camera: uint8[3 h w]}."""
        ...

    def boxes(self, cameras: Sequence[str] | None = None) -> dict[str, dict[str, Box]]:
        """{camera: {object, or "gripper": (ymin, xmin, ymax, xmax) in [0, 1]}} of what is visible."""
        ...

    def positions(self) -> dict[str, np.ndarray]:
        """Where the objects and the gripper are: f64[3] in metres, x to the right and y away from the robot."""
        ...

    def facts(self) -> Iterable[tuple[str, str, Sequence[str]]]:
        """Questions about the state of things beyond where they are, their answers, and what an image has to show.

        The last are names of `objects`. What no camera shows is not asked.
        """
        ...

    def place_hand(self, position: np.ndarray, effort: float) -> None:
        """Bring the hand near `position` f64[3] in metres at once, not as a robot would: for pictures of it there."""
        ...


def act_as_expert(env: Demonstrator, taken: list[np.ndarray] | None = None) -> bool:
    """Let the expert act, closed loop, for as long as an action lasts; returns whether the task was solved meanwhile.

    taken: gets what it did at each control step, f32[A]. Their mean, held that long, brings the hand to the same place.
    """
    solved = False
    for _ in range(env.action_repeat):
        action = env.expert_action()
        solved |= env.control_step(action)
        if taken is not None:
            taken.append(action)
    return solved


@runtime_checkable
class Chained(Environment, Protocol):
    """An environment that gives one instruction after the other, for as long as each is done.

    done    instructions that were done in a row
    length  all of them
    """

    @property
    def done(self) -> int: ...
    @property
    def length(self) -> int: ...


@runtime_checkable
class Continued(Demonstrator, Protocol):
    """A demonstrator whose tasks can follow each other in one scene."""

    def reset_after_others(self, seed: int) -> None:
        """As `reset`, but the experts of a few other tasks have done theirs since; the same for the same seed."""
        ...


@runtime_checkable
class SharedScene(Environment, Protocol):
    """An environment in whose scene other tasks can be solved too.

    solved_other   whether the watched task was solved in one of the steps since
    """

    @property
    def solved_other(self) -> bool: ...

    def watch(self, task: str) -> bool:
        """Watch, for this episode, whether another task is solved; returns whether the scene allows that.

        It does not where the other task needs other things, or is solved from the beginning.
        """
        ...


@runtime_checkable
class Instructed(Environment, Protocol):
    """An environment that can be told another task in the middle of an episode."""

    def instruct(self, task: str) -> bool:
        """Give another task's instruction until the next reset, in the scene as it is, and judge that task from now on.

        Returns whether the scene allows that, and changes nothing where it does not. It may not where the task is
        solved already.
        """
        ...


@runtime_checkable
class Pushed(Environment, Protocol):
    """An environment whose arm can be disturbed."""

    def push(self, offset: np.ndarray) -> None:
        """Displace the hand by `offset` f64[3] in metres (x to the right, y away from the robot), within its reach."""
        ...


@runtime_checkable
class Pictured(Environment, Protocol):
    """An environment that can be drawn sharper than a policy sees it."""

    def picture(self, size: int) -> np.ndarray:
        """What its first camera sees: uint8[3 size size]."""
        ...


@dataclass(frozen=True)
class View:
    """What a policy was trained to see: its cameras in order, their height and width in pixels, frames per second."""

    cameras: tuple[str, ...]
    image_size: int
    fps: float


def action_repeat(simulator: str, rate: float, view: View) -> int:
    """Steps that an action of the policy is held for, in a simulator that takes `rate` steps a second.

    Raises NoSuchEnvironment, with both rates, where that is not a whole number of them.
    """
    steps = round(rate / view.fps)
    if steps < 1 or not same_rate(steps * view.fps, rate):
        raise NoSuchEnvironment(
            f"the policy was trained at {view.fps:g} frames per second, which does not divide {simulator}'s {rate:g}"
            " Hz: name the simulator that it was trained in with --env, or how many of its steps an action lasts with"
            " --env.action_repeat"
        )
    return steps


def same_rate(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


@dataclass(frozen=True)
class EnvironmentConfig(ABC):
    """A simulator as configured."""

    has_expert: ClassVar[bool] = False
    """Whether `open` gives a `Demonstrator`."""
    held_out: ClassVar[bool] = False
    """Whether no training episode begins where those of a rollout do, as those that `pi05 collect` records here."""

    @property
    def num_states(self) -> int | None:
        """Initial states of a task, which rollouts and attempts then share; None where there is no end of them."""
        return None

    @property
    def sets_rate(self) -> bool:
        """Whether it says itself how long an action lasts, whatever rate the policy was trained at."""
        return False

    @abstractmethod
    def tasks(self, robot: Robot) -> list[str]:
        """The tasks to run where the user names none, for a policy of this robot."""

    @abstractmethod
    def open(self, task: str, view: View) -> Environment:
        """An environment in which an action lasts as long as between two frames that the policy was trained on, unless
        it `sets_rate`.

        Raises NoSuchEnvironment for an unknown task, cameras that are not there, a rate that cannot be had, a package
        that is missing, and where nothing can be rendered.
        """

    def sentences(self, task: str) -> Sequence[str]:
        """A task's instruction, and the same in other words; empty where only its environment can tell."""
        return ()

    def is_chain(self, task: str) -> bool:
        """Whether it gives one instruction after the other, see `Chained`."""
        return False

    def partners(self, tasks: Sequence[str]) -> dict[str, str]:
        """task -> another one of its scene, preferably one of `tasks`, for those that have one."""
        return {}

    def groups(self) -> Mapping[str, Sequence[str]]:
        """Tasks by difficulty, whose mean rates a summary adds; empty where a benchmark has none."""
        return {}

    def warm_up(self) -> None:  # noqa: B027 - by default there is nothing to do
        """Import what `open` needs: a process does it while others still plan.

        Raises NoSuchEnvironment for a package that is missing, and where nothing can be rendered.
        """

    def seeds(self, episodes: int, seed: int, split: str = "rollout") -> list[int]:
        """Seeds of a task's initial states, the same for every task."""
        return split_seeds(split, episodes, seed)


@dataclass(frozen=True)
class DemonstratorConfig(EnvironmentConfig, ABC):
    """A simulator with scripted experts that `pi05 collect` records.

    control_hz    control steps per second
    cameras       that are filmed where the user names none
    demonstrated  tasks that are recorded where the user names none
    robot         what it is called in a dataset; by default MetaWorld's arm, as are the next two
    state_names   of the dims of the state
    action_names  of the dims of an action, of which the first three move the hand, and the fourth closes its fingers
    """

    has_expert = held_out = True
    robot: ClassVar[str] = "sawyer"
    state_names: ClassVar[tuple[str, ...]] = ("x", "y", "z", "gripper_opening")
    action_names: ClassVar[tuple[str, ...]] = ("dx", "dy", "dz", "gripper_effort")
    control_hz: ClassVar[int]
    cameras: ClassVar[tuple[str, ...]]
    demonstrated: ClassVar[tuple[str, ...]]

    @abstractmethod
    def check_task(self, task: str) -> None:
        """Raises NoSuchEnvironment, a ValueError, when there is no task of this name."""

    @abstractmethod
    def open(self, task: str, view: View) -> Demonstrator: ...


def tasks_to_run(env: EnvironmentConfig, tasks: Sequence[str] | None, robot: Robot) -> list[str]:
    """`tasks` if any are named, else those to run with a policy of this robot. ValueError where that says none."""
    found = list(tasks or env.tasks(robot))
    if not found:
        raise ValueError("tasks: the policy does not say what it was trained on: name some")
    return found


def check_tasks(env: EnvironmentConfig, tasks: Iterable[str]) -> None:
    """Raises ValueError for a task that there is not, where that shows before an episode is run."""
    if isinstance(env, DemonstratorConfig):
        for task in tasks:
            env.check_task(task)
