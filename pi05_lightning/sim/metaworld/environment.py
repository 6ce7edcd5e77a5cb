"""MetaWorld as a robot that can be asked for the truth: observations for a policy, labels and experts for `collect`.

What differs from plain MetaWorld:
- initial states are a pure function of (task, seed), and differ between tasks;
- a decision lasts `action_repeat` control steps of 1/80 s: the action is held;
- rendering is on demand, without shadows, reflections and multisampling, and leaves out what no ray can hit;
- the expert sees the goal, the observation holds the four proprioceptive values and the images alone.
"""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lightning.sim.environment import EnvironmentConfig, NoSuchEnvironment, View, action_repeat
from pi05_lightning.sim.metaworld.tasks import GRIPPER, ModelPart, task_language, task_of_sentence
from pi05_lightning.types import Box, Frame

if TYPE_CHECKING:
    from pi05_lightning.data.robot import Robot

CONTROL_HZ = 80  # MetaWorld: 5 MuJoCo steps of 2.5 ms
STATE_NAMES = ("x", "y", "z", "gripper_opening")
ACTION_NAMES = ("dx", "dy", "dz", "gripper_effort")
_PLACING_STEPS = 100  # MuJoCo steps in which the hand follows wherever it is sent
_VISIBLE_PIXELS = 4  # fewer of an object are a sliver behind something else
_HIDDEN_GROUP = 5  # a geom group that MuJoCo does not draw


@dataclass(frozen=True)
class Camera:
    """A MetaWorld camera, moved by `offset` metres and zoomed to `fovy` degrees; `rotate` turns the image by 180°."""

    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fovy: float | None = None
    rotate: bool = False


CAMERAS = {"topview": Camera((0.0, 0.15, 0.0), fovy=28.0), "corner2": Camera(rotate=True)}
"""Cameras that are not used as MetaWorld defines them."""

POLICY_CAMERAS = ("topview", "gripperPOV")


def choose_rendering() -> None:
    """Off-screen with EGL, unless the user chose otherwise; before MuJoCo is imported, which reads it then."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa in the calling thread: at this size its pool only costs


@cache
def check_rendering() -> None:
    """Raises NoSuchEnvironment, which says what to install or to set, where MuJoCo cannot render."""
    choose_rendering()
    try:
        import mujoco

        gl = mujoco.GLContext(8, 8)
        gl.make_current()
        mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100).free()
        gl.free()
    except Exception as error:  # each of its backends has its own ways to fail
        raise NoSuchEnvironment(
            f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({type(error).__name__}: {error}):"
            " set MUJOCO_GL=egl and install Mesa's EGL (Debian, Ubuntu: apt-get install libegl1 libegl-mesa0"
            " libgl1-mesa-dri libopengl0)"
        ) from error


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
    if task not in task_names():
        raise NoSuchEnvironment(f"MetaWorld has no task {task!r}: use one of {', '.join(task_names())}")


def scene_of(task: str) -> str:
    """The file of the scene that a task is set in, which several may share."""
    kind: Any = import_metaworld().env_dict.ALL_V3_ENVIRONMENTS[task]
    return kind.model_name.fget(None)


@dataclass(frozen=True)
class MetaWorld(EnvironmentConfig):
    """MetaWorld's 50 tasks by name, seen as the policy was trained to see them."""

    has_expert = True

    def warm_up(self) -> None:
        import_metaworld()

    def tasks(self, robot: Robot) -> list[str]:
        """Those that the policy was trained on, from their instructions."""
        return [task_of_sentence(sentence) for sentence in robot.tasks]

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


class MetaWorldEnvironment:
    """One MetaWorld task.

    Args:
        task: a name of `task_names()`, such as `drawer-open-v3`.
        image_size: height and width of the images, in pixels.
        cameras: MetaWorld's camera names (topview, gripperPOV, corner, corner2, corner3, corner4, behindGripper).
        action_repeat: control steps that one `step` lasts.

    Raises NoSuchEnvironment, a ValueError, on an unknown task or camera. Close it before the interpreter exits, or use
    it as a context.
    """

    max_seconds = 6.0
    ended = False  # an episode goes on for as long as the caller likes
    action_low, action_high = np.full(4, -1.0), np.full(4, 1.0)

    def __init__(
        self,
        task: str,
        image_size: int = 64,
        cameras: Sequence[str] = POLICY_CAMERAS,
        action_repeat: int = 8,
    ):
        check_task(task)
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task = task
        self.language = task_language(task)
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
        self._others = dict[str, Any]()  # tasks that were watched, in simulators of their own
        self._other: Any = None  # the one that is watched
        self.solved_other = False
        self._obs = np.zeros(39)
        self._set_up_rendering(image_size)

    def _set_up_rendering(self, size: int) -> None:
        mujoco, model = self._mujoco, self._env.model
        self._camera_ids = {}
        for name in self.cameras:
            camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
            if camera_id < 0:
                known = ", ".join(model.camera(i).name for i in range(model.ncam))
                raise NoSuchEnvironment(f"{self.task} has no camera {name!r}: use one of {known}")
            camera = CAMERAS.get(name, Camera())
            model.cam_pos[camera_id] += camera.offset
            if camera.fovy is not None:
                model.cam_fovy[camera_id] = camera.fovy
            self._camera_ids[name] = camera_id
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 1
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._renderer = mujoco.Renderer(model, size, size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False
        self._draw_options = mujoco.MjvOption()
        self._objects = {name: self._ids(part) for name, part in {**self.language.objects, "gripper": GRIPPER}.items()}
        self._is_geom = {name: np.isin(np.arange(model.ngeom + 1), ids[0]) for name, ids in self._objects.items()}
        self._is_site = {name: np.isin(np.arange(model.nsite + 1), ids[1]) for name, ids in self._objects.items()}

    def reset(self, seed: int) -> None:
        """Put the robot and the objects where `seed` says; the same for the same (task, seed), whatever came before."""
        self._env.seed(int(np.random.SeedSequence([seed, zlib.crc32(self.task.encode())]).generate_state(1)[0]))
        self._obs, _ = self._env.reset()
        self._other, self.solved_other = None, False

    def watch(self, task: str) -> bool:
        """Watch until the next reset whether another task is solved; returns whether this task's scene allows that."""
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        check_task(task)
        if task not in self._others:
            self._others[task] = ALL_V3_ENVIRONMENTS[task]()
        other = self._others[task]
        own_size, size = (len(env._random_reset_space.low) for env in (self._env, other))
        if scene_of(task) == scene_of(self.task) and size == own_size:
            other._partially_observable = False
            other._set_task_called = True
            other._last_rand_vec = self._env._last_rand_vec  # what is where
            other.reset()
            self._other = None if self._is_solved(other) else other
        return self._other is not None

    def _is_solved(self, other: Any) -> bool:
        """Whether another task of the same scene is solved in our state."""
        model, data, ours = other.model, other.data, self._env.data
        model.body_pos[:], model.body_quat[:] = self._env.model.body_pos, self._env.model.body_quat
        data.qpos[:], data.qvel[:] = ours.qpos, ours.qvel
        data.mocap_pos[:], data.mocap_quat[:] = ours.mocap_pos, ours.mocap_quat
        self._mujoco.mj_forward(model, data)
        return bool(other.evaluate_state(other._get_obs(), np.zeros(4, np.float32))[1]["success"])

    def step(self, action: np.ndarray) -> bool:
        """Hold `action` f32[4] (dx, dy, dz, gripper effort, clipped to [-1, 1]) for `action_repeat` control steps.

        Returns whether the task succeeded in one of them.
        """
        successes = [self.control_step(action) for _ in range(self.action_repeat)]
        return any(successes)

    def control_step(self, action: np.ndarray) -> bool:
        """One control step of 1/80 s; returns whether the task is solved."""
        self._obs, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0).astype(np.float32))
        if self._other is not None and not self.solved_other:
            self.solved_other = self._is_solved(self._other)
        return bool(info["success"])

    def expert_step(self) -> bool:
        """As long as a `step`, with what the expert does at each control step."""
        successes = [self.control_step(self.expert_action()) for _ in range(self.action_repeat)]
        return any(successes)

    def expert_action(self) -> np.ndarray:
        """What MetaWorld's scripted expert does now, for one control step: f32[4] in [-1, 1]."""
        return np.clip(self._policy.get_action(self._obs), -1.0, 1.0).astype(np.float32)

    @property
    def sentence(self) -> str:
        """The instruction."""
        return self.language.sentence

    @property
    def fps(self) -> float:
        """Actions per second."""
        return CONTROL_HZ / self.action_repeat

    @property
    def state(self) -> np.ndarray:
        """f32[4]: hand position in metres, gripper opening in [0, 1]."""
        return self._obs[:4].astype(np.float32)

    def observation(self) -> Frame:
        """What a policy may see: images, the instruction and `state`."""
        return Frame(images=self.render(), task=self.language.sentence, state=self.state)

    def subtask(self) -> str:
        """What the expert is doing at the moment, in words."""
        if self.language.phase is None:
            return self.language.sentence
        return self.language.phase(self._policy._parse_obs(self._obs))

    def positions(self) -> dict[str, np.ndarray]:
        """Where the task's objects and the gripper are: f64[3] in metres, x to the right and y away from the robot."""
        data, places = self._env.data, {}
        for name, (geoms, sites) in self._objects.items():
            places[name] = np.concatenate([data.geom_xpos[geoms], data.site_xpos[sites]]).mean(0)
        places["gripper"] = self._env.tcp_center.copy()
        return places

    def place_hand(self, position: np.ndarray, effort: float) -> None:
        """Bring the hand near `position` f64[3] in metres at once, not as a robot would: for pictures of it there."""
        self._env.data.mocap_pos[:] = position
        self._env.do_simulation([effort, -effort], _PLACING_STEPS)
        self._obs = self._env._get_obs()

    @property
    def workspace(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest place the hand can be sent to: f64[3] in metres, twice."""
        return self._env.mocap_low, self._env.mocap_high

    def render(self, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """{camera: uint8[3 h w]}."""
        return {name: np.ascontiguousarray(self._draw(name).transpose(2, 0, 1)) for name in cameras or self.cameras}

    def boxes(self, cameras: Sequence[str] | None = None) -> dict[str, dict[str, Box]]:
        """{camera: {object: (ymin, xmin, ymax, xmax) in [0, 1]}} of what is visible, from MuJoCo's segmentation."""
        self._renderer.enable_segmentation_rendering()
        found = {name: self._boxes_of(self._draw(name)) for name in cameras or self.cameras}
        self._renderer.disable_segmentation_rendering()
        return found

    def _boxes_of(self, segmentation: np.ndarray) -> dict[str, Box]:
        ids, kinds = np.moveaxis(segmentation, 2, 0)
        geom_ids = np.where(kinds == int(self._mujoco.mjtObj.mjOBJ_GEOM), ids, -1)
        site_ids = np.where(kinds == int(self._mujoco.mjtObj.mjOBJ_SITE), ids, -1)
        size, boxes = len(ids), {}
        for name in self._objects:
            shown = self._is_geom[name][geom_ids] | self._is_site[name][site_ids]
            if shown.sum() >= _VISIBLE_PIXELS:
                rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
                boxes[name] = (rows[0] / size, columns[0] / size, (rows[-1] + 1) / size, (columns[-1] + 1) / size)
        return boxes

    def _ids(self, part: ModelPart) -> tuple[np.ndarray, np.ndarray]:
        """Geom and site ids of a part."""
        model = self._env.model
        bodies = {model.body(name).id for name in part.bodies}
        material = None if part.material is None else model.mat(part.material).id
        geoms = [model.geom(name).id for name in part.geoms]
        for geom in range(model.ngeom if part.bodies or part.material else 0):
            drawn = model.geom_group[geom] < 3
            inside = not part.bodies or model.geom_bodyid[geom] in bodies
            if drawn and inside and material in (None, model.geom_matid[geom]):
                geoms.append(geom)
        return np.array(geoms, int), np.array([model.site(name).id for name in part.sites], int)

    def _draw(self, name: str) -> np.ndarray:
        model, data = self._env.model, self._env.data
        groups = model.geom_group.copy()
        model.geom_group[:] = np.where(self._in_view(self._camera_ids[name]), groups, _HIDDEN_GROUP)
        self._renderer.update_scene(data, camera=name, scene_option=self._draw_options)
        model.geom_group[:] = groups
        image = self._renderer.render()
        return image[::-1, ::-1] if CAMERAS.get(name, Camera()).rotate else image

    def _in_view(self, camera_id: int) -> np.ndarray:
        """bool[ngeom]: the bounding sphere touches the camera's pyramid. This halves the time of drawing."""
        model, data = self._env.model, self._env.data
        centre = (data.geom_xpos - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)
        slope = np.tan(np.deg2rad(model.cam_fovy[camera_id]) / 2)
        depth, radius = -centre[:, 2], model.geom_rbound
        outside = (np.abs(centre[:, :2]) - slope * depth[:, None]).max(1) / np.sqrt(1 + slope**2)
        return (radius == 0) | ((outside <= radius) & (depth + radius > 0))  # radius 0: planes

    def close(self) -> None:
        """Free the renderer; without it EGL complains when the interpreter exits."""
        self._renderer.close()
        for env in (self._env, *self._others.values()):
            env.close()

    def __enter__(self) -> MetaWorldEnvironment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
