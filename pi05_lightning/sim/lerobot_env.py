"""Any environment that LeRobot's factory makes (`lerobot.envs.factory`), PushT and LIBERO among them.

Observations come as LeRobot's own evaluation builds them: `preprocess_observation`, then the environment's processor.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lightning.files.ranges import check_range
from pi05_lightning.sim.environment import EnvironmentConfig, NoSuchEnvironment, View, action_repeat
from pi05_lightning.sim.metaworld.mt50 import MT50, SENTENCES
from pi05_lightning.sim.rendering import check_rendering, choose_rendering
from pi05_lightning.sim.splits import LIBERO_STATES, in_32_bits, libero_states
from pi05_lightning.types import Frame

if TYPE_CHECKING:
    from pi05_lightning.data.robot import Robot

_IMAGES = ("observation.image", "observation.images.")
_DEFAULT_STEPS = 500  # of an episode, for environments that set no limit


@dataclass(frozen=True)
class LeRobotEnv(EnvironmentConfig):
    """An environment of LeRobot's factory. A task is LeRobot's `task`; `suite/3` is number 3 of a suite."""

    type: str
    """Its name in LeRobot, such as pusht, aloha, metaworld or libero."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of LeRobot's configuration of this type, such as {obs_type: pixels_agent_pos}."""
    cameras: dict[str, str] = field(default_factory=dict)
    """The policy's cameras, each with its name in the environment, where that is another."""
    sentence: str | None = None
    """The instruction, for environments that have none."""
    action_repeat: int | None = None
    """Steps that an action is held for; by default the environment's rate (`fps` in LeRobot's configuration) over the
    policy's, which must be a whole number."""

    def __post_init__(self) -> None:
        check_range("action_repeat", self.action_repeat, 1)

    def warm_up(self) -> None:
        self._config()

    def tasks(self, robot: Robot) -> list[str]:
        """The one of its options or LeRobot's default; of MetaWorld those that the policy was trained on."""
        return MT50().tasks(robot) if self._is_mt50 else [self._config().task]

    def sentences(self, task: str) -> Sequence[str]:
        """The configured one, or MetaWorld's; what others say shows in their scene alone."""
        said = self.sentence or (SENTENCES.get(task) if self.type == "metaworld" else None)
        return (said,) if said else ()

    def groups(self) -> Mapping[str, Sequence[str]]:
        return MT50().groups() if self._is_mt50 else {}

    @property
    def num_states(self) -> int | None:
        return LIBERO_STATES if self.type == "libero" else None

    def seeds(self, episodes: int, seed: int, split: str = "rollout") -> list[int]:
        if self.type == "libero":
            return libero_states(split, episodes, seed)
        return super().seeds(episodes, seed, split)

    @property
    def sets_rate(self) -> bool:
        return self.action_repeat is not None

    @property
    def _is_mt50(self) -> bool:
        return self.type == "metaworld" and "task" not in self.options

    def open(self, task: str, view: View) -> LeRobotEnvironment:
        env, config = self.make(task)
        return LeRobotEnvironment(env, config, view, self.cameras, self.sentence, self.action_repeat)

    def make(self, task: str) -> tuple[Any, Any]:
        """The gymnasium environment of a task and LeRobot's configuration of it.

        Raises NoSuchEnvironment for a type, a task or an option that LeRobot does not know, for a missing package, and
        where it cannot be made or MuJoCo, if it uses that, cannot render.
        """
        choose_rendering()
        from lerobot.envs.factory import make_env

        name, _, number = task.rpartition("/") if task.rpartition("/")[2].isdigit() else (task, "", "")
        config = self._config(task=name)
        try:
            with quiet():
                suites = make_env(config, n_envs=1)
        except ModuleNotFoundError as error:
            how = f"pip install 'lerobot[{self.type}]'" if self.type in extras("lerobot") else "install it"
            missing = f"LeRobot's {self.type} needs a package that is not installed: {how} ({error})"
            raise NoSuchEnvironment(missing) from error
        except KeyError as error:
            raise NoSuchEnvironment(f"LeRobot's {self.type} has no task {name!r}") from error
        except Exception as error:  # a simulator's own, of which there is no end
            if find_spec("mujoco"):
                check_rendering()
            problem = f"{type(error).__name__}: {error}"
            raise NoSuchEnvironment(f"LeRobot's {self.type} cannot be made at task {name!r}: {problem}") from error
        if "mujoco" in sys.modules:
            check_rendering()
        by_number = {key: vector for suite in suites.values() for key, vector in suite.items()}
        if not number and len(by_number) == 1:
            number = str(next(iter(by_number)))
        if not number or int(number) not in by_number:
            known = f"{name} is a suite: name its tasks as {name}/0, with the numbers {sorted(by_number)}"
            raise NoSuchEnvironment(f"LeRobot's {self.type} has no task {task!r}: {known}")
        chosen = by_number.pop(int(number))
        for vector in by_number.values():
            vector.close()
        return chosen.envs[0], config

    def _config(self, **changes: Any) -> Any:
        from lerobot.envs.factory import make_env_config

        try:
            return make_env_config(self.type, **self.options | changes)
        except (TypeError, ValueError) as error:  # in LeRobot's own words
            raise NoSuchEnvironment(f"LeRobot has no {self.type} with the options {self.options}: {error}") from error


def extras(distribution: str) -> list[str]:
    """What a distribution can be installed with, as in `pip install 'name[extra]'`."""
    return metadata(distribution).get_all("Provides-Extra") or []


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps simulators from telling what they import and make, in every process."""
    level = logging.root.manager.disable
    with redirect_stdout(io.StringIO()):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


class LeRobotEnvironment:
    """One gymnasium environment that LeRobot made.

    Args:
        env: the environment itself, not the vector of one: a vector begins a new episode by itself.
        config: LeRobot's configuration of it: rate and processors.
        view: the cameras that the policy wants.
        cameras: their names in the environment, where those are others.
        sentence: the instruction; by default the environment's `task_description`.
        repeat: its steps that an action is held for; by default as many as keep to the policy's rate.

    Raises NoSuchEnvironment when there is no instruction, and for rates of which one does not divide the other.
    """

    def __init__(
        self,
        env: Any,
        config: Any,
        view: View,
        cameras: dict[str, str],
        sentence: str | None = None,
        repeat: int | None = None,
    ) -> None:
        self._env, self._config = env, config
        self._cameras = {name: cameras.get(name, name) for name in view.cameras}
        described = sentence or getattr(env.unwrapped, "task_description", None)
        if described == "":  # some say what is to be done once they have begun
            env.reset(seed=0)
            described = env.unwrapped.task_description
        if not described:
            raise NoSuchEnvironment(
                f"LeRobot's {config.type} has no instruction of its own: give one with --env.sentence"
            )
        self.sentence: str = described
        self._repeat = repeat or action_repeat(f"LeRobot's {config.type}", config.fps, view)
        self.fps = config.fps / self._repeat
        limit = (env.spec and env.spec.max_episode_steps) or getattr(env.unwrapped, "_max_episode_steps", None)
        self.max_seconds = (limit or _DEFAULT_STEPS) / config.fps
        self.action_low, self.action_high = env.action_space.low, env.action_space.high
        self.ended = False
        self._before, self._after = config.get_env_processors()
        self._seen: dict[str, Any] = {}

    def reset(self, seed: int) -> None:
        if hasattr(self._env.unwrapped, "init_state_id"):  # LIBERO's: it goes on to the next one, whatever the seed
            self._env.unwrapped.init_state_id = seed
        self._seen, _ = self._env.reset(seed=in_32_bits(seed))
        self.ended = False

    def observation(self) -> Frame:
        """Raises NoSuchEnvironment when the environment does not have the policy's cameras."""
        from lerobot.envs.utils import preprocess_observation

        seen = self._before(preprocess_observation(_batched(self._seen)))
        images = {
            key.rpartition(".")[2]: (value[0] * 255).round().byte().numpy()
            for key, value in seen.items()
            if key.startswith(_IMAGES)
        }
        missing = set(self._cameras.values()) - set(images)
        if missing:
            raise NoSuchEnvironment(
                f"LeRobot's {self._config.type} has the cameras {sorted(images)} and the policy wants"
                f" {list(self._cameras)}: say which is which with --env.cameras '{{policy camera: its name here}}'"
            )
        state = seen.get("observation.state")
        return Frame(
            images={name: images[there] for name, there in self._cameras.items()},
            task=self.sentence,
            state=None if state is None else state[0].float().numpy(),
        )

    def step(self, action: np.ndarray) -> bool:
        """Hold an action until it has lasted, or the episode is over; returns whether one of the steps succeeded."""
        import torch

        ready = self._after({"action": torch.as_tensor(action)[None]})["action"][0].numpy()
        success = False
        for _ in range(self._repeat):
            self._seen, _, terminated, truncated, info = self._env.step(ready.astype(self._env.action_space.dtype))
            self.ended = bool(terminated or truncated)
            success |= bool(info.get("is_success", False))
            if self.ended:
                break
        return success

    def close(self) -> None:
        self._env.close()


def _batched(observation: Any) -> Any:
    """The same nested dictionary with a batch of one in front of every array."""
    if isinstance(observation, dict):
        return {key: _batched(value) for key, value in observation.items()}
    return np.asarray(observation)[None]
