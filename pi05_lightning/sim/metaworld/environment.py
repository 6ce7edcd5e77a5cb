"""MetaWorld as a robot that can be asked for the truth: observations for a policy, labels and experts for `collect`.

What differs from plain MetaWorld:
- initial states are a pure function of (task, seed), and differ between tasks;
- a decision lasts `action_repeat` control steps of 1/80 s: the action is held;
- rendering is on demand, without shadows, reflections and multisampling, and leaves out what no ray can hit;
- the expert sees the goal, the observation holds the four proprioceptive values and the images alone.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.sim.environment import DemonstratorConfig, NoSuchEnvironment, View, action_repeat
from pi05_lightning.sim.metaworld.tasks import LANGUAGE, task_of_sentence
from pi05_lightning.sim.rendering import GRIPPER, Camera, Cameras, check_rendering
from pi05_lightning.sim.sawyer import CONTROL_HZ, Sawyer

if TYPE_CHECKING:
    from pi05_lightning.data.robot import Robot

_PLACING_STEPS = 100  # MuJoCo steps in which the hand follows wherever it is sent

CAMERAS = {"topview": Camera(offset=(0.0, 0.15, 0.0), fovy=28.0), "corner2": Camera(rotate=True)}
"""Cameras that are not used as MetaWorld defines them."""

POLICY_CAMERAS = ("topview", "gripperPOV")


def import_metaworld() -> ModuleType:
    """MetaWorld's package, with MuJoCo set to render off-screen.

    Raises NoSuchEnvironment that names the extra to install, and where MuJoCo cannot render.
    """
    if any(find_spec(name) is None for name in ("metaworld", "mujoco")):
        raise NoSuchEnvironment("MetaWorld is not installed: pip install 'pi05_lightning[sim]'")
    check_rendering()  # else importing MetaWorld may fail, and says nothing that helps
    import metaworld

    warnings.filterwarnings("ignore", message="Constant.* may be too high")  # its experts exceed 1 and are clipped
    return metaworld


def task_names() -> list[str]:
    """The 50 MetaWorld tasks by name."""
    return sorted(import_metaworld().env_dict.ALL_V3_ENVIRONMENTS)


def check_task(task: str) -> None:
    """Raises NoSuchEnvironment, a ValueError, when MetaWorld has no task of this name."""
    known = task_names()
    if task not in known:
        raise NoSuchEnvironment(
            f"MetaWorld has no task {task!r}{suggestion(task, known)}: use one of {', '.join(known)}"
        )


def scene_of(task: str) -> str:
    """The file of the scene that a task is set in, which several may share."""
    kind: Any = import_metaworld().env_dict.ALL_V3_ENVIRONMENTS[task]
    return kind.model_name.fget(None)


def metaworld_seed(task: str, seed: int) -> int:
    """What MetaWorld's generator is seeded with, so that tasks differ at the same seed."""
    return int(np.random.SeedSequence([seed, zlib.crc32(task.encode())]).generate_state(1)[0])


@dataclass(frozen=True)
class MetaWorld(DemonstratorConfig):
    """MetaWorld's 50 tasks by name, seen as the policy was trained to see them."""

    control_hz = CONTROL_HZ
    cameras: ClassVar[tuple[str, ...]] = POLICY_CAMERAS
    demonstrated: ClassVar[tuple[str, ...]] = (
        "window-open-v3",
        "drawer-open-v3",
        "button-press-topdown-v3",
        "faucet-close-v3",
    )

    def check_task(self, task: str) -> None:
        check_task(task)

    def warm_up(self) -> None:
        import_metaworld()

    def tasks(self, robot: Robot) -> list[str]:
        """Those that the policy was trained on, from their instructions.

        Raises NoSuchEnvironment, a ValueError, for an instruction of another simulator.
        """
        found = {sentence: task_of_sentence(sentence) for sentence in robot.tasks}
        if others := [sentence for sentence, task in found.items() if task not in LANGUAGE]:
            raise NoSuchEnvironment(
                f"the policy was trained on {others[0]!r}, which is no task of MetaWorld: name its simulator"
                " (`env`, as MT50 or Desk), or `tasks`"
            )
        return list(found.values())

    def sentences(self, task: str) -> Sequence[str]:
        return (LANGUAGE[task].sentence,)

    def partners(self, tasks: Sequence[str]) -> dict[str, str]:
        found = dict[str, str]()
        for task in tasks:
            check_task(task)
            others = [other for other in (*tasks, *task_names()) if other != task and scene_of(other) == scene_of(task)]
            if others and (others[0] in tasks or len(tasks) == 1):
                found[task] = others[0]
        return found

    def open(self, task: str, view: View) -> MetaWorldEnvironment:
        repeat = action_repeat("MetaWorld", CONTROL_HZ, view)
        return MetaWorldEnvironment(task, view.image_size, view.cameras, repeat)


OF_AN_OBJECT = 3
"""Numbers that MetaWorld draws for a task whose goal follows from where its object is; others draw the goal too."""


class MetaWorldEnvironment(Sawyer):
    """One MetaWorld task.

    Args:
        task: a name of `task_names()`, such as `drawer-open-v3`.
        image_size: height and width of the images, in pixels.
        cameras: MetaWorld's camera names (topview, gripperPOV, corner, corner2, corner3, corner4, behindGripper).
        action_repeat: control steps that one `step` lasts.
        sentences: task -> its instruction; by default those of `LANGUAGE`.
        changed: {camera: how it differs from MetaWorld's}.
        max_seconds: after which an episode has failed.

    Raises NoSuchEnvironment, a ValueError, on an unknown task or camera. Close it before the interpreter exits, or use
    it as a context.
    """

    other_sentences = ()  # of an instruction

    def __init__(
        self,
        task: str,
        image_size: int = 64,
        cameras: Sequence[str] = POLICY_CAMERAS,
        action_repeat: int = 8,
        sentences: Mapping[str, str] | None = None,
        changed: Mapping[str, Camera] = CAMERAS,
        max_seconds: float = 6.0,
    ):
        check_task(task)
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task = task
        self.language = LANGUAGE[task]
        self._sentences = sentences
        self._sentence = self._instruction(task)
        self.max_seconds = max_seconds
        self.objects = tuple(self.language.objects)
        self.target = next(iter(self.objects), None)
        self.cameras = tuple(cameras)
        self.action_repeat = action_repeat
        self._mujoco = mujoco
        self._env: Any = ALL_V3_ENVIRONMENTS[task]()
        self._env._partially_observable = False  # for the expert; `observation` never shows the goal
        del self._env.sawyer_observation_space  # cached with the goal hidden, and steps clip to it
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False  # `seed`, not a task object, decides where things are
        self._env.seeded_rand_vec = True
        self._env.max_path_length = sys.maxsize  # the caller bounds episodes
        policies: dict[str, Any] = ENV_POLICY_MAP
        self._policy = policies[task]()
        self._others = dict[str, Any]()  # tasks that were watched or told, in simulators of their own
        self._told: Any = None  # the one that is judged instead of the own
        self._other: Any = None  # the one that is watched
        self.solved_other = False
        self._obs = np.zeros(39)
        things = {**self.language.objects, "gripper": GRIPPER}
        self._views = Cameras(task, self._env.model, image_size, self.cameras, changed, things)

    def reset(self, seed: int) -> None:
        """Put the robot and the objects where `seed` says; the same for the same (task, seed), whatever came before."""
        self._env.seed(metaworld_seed(self.task, seed))
        self._obs, _ = self._env.reset()
        self._other, self.solved_other = None, False
        self.instruct(self.task)

    def watch(self, task: str) -> bool:
        """Watch until the next reset whether another task is solved; returns whether this task's scene allows that."""
        other = self._beside(task)
        self._other = None if other is None or self._is_solved(other) else other
        return self._other is not None

    def instruct(self, task: str) -> bool:
        """Give another task's instruction until the next reset; returns whether this task's scene allows that.

        It does not where that other task is solved already.
        """
        other = None if task == self.task else self._beside(task)
        if task != self.task and (other is None or self._is_solved(other)):
            return False
        self._sentence, self._told = self._instruction(task), other
        return True

    def _instruction(self, task: str) -> str:
        return LANGUAGE[task].sentence if self._sentences is None else self._sentences[task]

    def _beside(self, task: str) -> Any:
        """Another task's simulator with what is here, where it is; None where it is of another scene."""
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        check_task(task)
        if task not in self._others:
            self._others[task] = ALL_V3_ENVIRONMENTS[task]()
        other = self._others[task]
        own_size, size = (len(env._random_reset_space.low) for env in (self._env, other))
        # where a goal is drawn too, it would be ours: what we are asked to do would count as done for the other
        if scene_of(task) != scene_of(self.task) or not size == own_size == OF_AN_OBJECT:
            return None
        other._partially_observable = False
        other._set_task_called = True
        other._last_rand_vec = self._env._last_rand_vec  # what is where
        other.reset()
        return other

    def _is_solved(self, other: Any) -> bool:
        """Whether another task of the same scene is solved in our state."""
        model, data, ours = other.model, other.data, self._env.data
        model.body_pos[:], model.body_quat[:] = self._env.model.body_pos, self._env.model.body_quat
        data.qpos[:], data.qvel[:] = ours.qpos, ours.qvel
        data.mocap_pos[:], data.mocap_quat[:] = ours.mocap_pos, ours.mocap_quat
        self._mujoco.mj_forward(model, data)
        return bool(other.evaluate_state(other._get_obs(), np.zeros(4, np.float32))[1]["success"])

    def control_step(self, action: np.ndarray) -> bool:
        self._obs, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0).astype(np.float32))
        if self._other is not None and not self.solved_other:
            self.solved_other = self._is_solved(self._other)
        return bool(info["success"]) if self._told is None else self._is_solved(self._told)

    def expert_action(self) -> np.ndarray:
        """What MetaWorld's scripted expert does now, for one control step: f32[4] in [-1, 1]."""
        return np.clip(self._policy.get_action(self._obs.copy()), -1.0, 1.0).astype(np.float32)

    @property
    def _data(self) -> Any:
        return self._env.data

    @property
    def _fingertips(self) -> np.ndarray:
        return self._env.tcp_center.copy()

    @property
    def sentence(self) -> str:
        return self._sentence

    @property
    def state(self) -> np.ndarray:
        return self._obs[:4].astype(np.float32)

    def subtask(self) -> str:
        """What the expert is doing at the moment, in words."""
        return self.language.phase(self._policy._parse_obs(self._obs))

    def facts(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """Nothing is asked beyond where things are."""
        yield from ()

    def place_hand(self, position: np.ndarray, effort: float) -> None:
        self._env.data.mocap_pos[:] = position
        self._env.do_simulation([effort, -effort], _PLACING_STEPS)
        self._obs = self._env._get_obs()

    @property
    def workspace(self) -> tuple[np.ndarray, np.ndarray]:
        return self._env.mocap_low, self._env.mocap_high

    def close(self) -> None:
        super().close()
        for env in (self._env, *self._others.values()):
            env.close()
