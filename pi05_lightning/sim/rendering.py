"""MuJoCo seen through cameras: images, and boxes of named things, without what costs time and shows nothing.

No shadows, reflections and multisampling, and what no ray can hit is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pi05_lightning.sim.environment import NoSuchEnvironment
from pi05_lightning.types import Box

_VISIBLE_PIXELS = 4  # fewer of an object are a sliver behind something else
_HIDDEN_GROUP = 5  # a geom group that MuJoCo does not draw


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


@dataclass(frozen=True)
class Camera:
    """A model's camera: put to `pos` or moved by `offset`, in metres, and zoomed to `fovy` degrees.

    `rotate` turns the image by 180°.
    """

    pos: tuple[float, float, float] | None = None
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fovy: float | None = None
    rotate: bool = False


@dataclass(frozen=True)
class ModelPart:
    """Where a named thing is in the MuJoCo model: the geoms of some bodies, of a material, or both; geoms; sites."""

    bodies: tuple[str, ...] = ()
    material: str | None = None
    geoms: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()


def bodies(*names: str) -> ModelPart:
    return ModelPart(bodies=names)


GRIPPER = bodies("right_l6", "right_hand", "hand", "rightclaw", "leftclaw", "rightpad", "leftpad")
"""Of MetaWorld's arm, with the flange that it is at: from above little else of it is seen."""


class Cameras:
    """Draws a model with some of its cameras, and finds named things in what they see.

    Args:
        scene: what the model is called in errors.
        model: it; cameras are moved in it.
        size: height and width of the images, in pixels.
        names: of its cameras.
        changed: {camera: how it differs from the model's}.
        things: {name: where it is in the model}, all that boxes are wanted of.

    Raises NoSuchEnvironment on an unknown camera. Close it before the interpreter exits, or EGL complains.
    """

    def __init__(
        self,
        scene: str,
        model: Any,
        size: int,
        names: Sequence[str],
        changed: Mapping[str, Camera],
        things: Mapping[str, ModelPart],
    ) -> None:
        import mujoco

        self._mujoco, self._model, self._changed = mujoco, model, changed
        self._ids = {}
        for name in names:
            camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
            if camera_id < 0:
                known = ", ".join(model.camera(i).name for i in range(model.ncam))
                raise NoSuchEnvironment(
                    f"{scene} has no camera {name!r}: use one of {known}, or the simulator that has it (--env)"
                )
            camera = changed.get(name, Camera())
            if camera.pos is not None:
                model.cam_pos[camera_id] = camera.pos
            model.cam_pos[camera_id] += camera.offset
            if camera.fovy is not None:
                model.cam_fovy[camera_id] = camera.fovy
            self._ids[name] = camera_id
        self._renderer = self._renderer_of(size)
        self._sharp: Any = None  # one for people, once they look
        self._options = mujoco.MjvOption()
        self._things = {name: ids_of(model, part) for name, part in things.items()}
        self._is_geom = {name: np.isin(np.arange(model.ngeom + 1), ids[0]) for name, ids in self._things.items()}
        self._is_site = {name: np.isin(np.arange(model.nsite + 1), ids[1]) for name, ids in self._things.items()}

    def _renderer_of(self, size: int, samples: int = 0) -> Any:
        """samples: per pixel, of multisampling."""
        look = self._model.vis
        look.quality.offsamples, look.quality.shadowsize = samples, 1
        look.global_.offwidth = look.global_.offheight = size
        renderer = self._mujoco.Renderer(self._model, size, size)
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False
        return renderer

    def images(self, data: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
        """{camera: uint8[3 h w]}."""
        drawn = {name: self._draw(self._renderer, data, name) for name in names}
        return {name: np.ascontiguousarray(image.transpose(2, 0, 1)) for name, image in drawn.items()}

    def picture(self, data: Any, name: str, size: int) -> np.ndarray:
        """What a camera sees, for people to look at: uint8[3 size size]."""
        if self._sharp is None or self._sharp.height != size:
            if self._sharp is not None:
                self._sharp.close()
            self._sharp = self._renderer_of(size, samples=4)
        return np.ascontiguousarray(self._draw(self._sharp, data, name).transpose(2, 0, 1))

    def boxes(self, data: Any, names: Sequence[str]) -> dict[str, dict[str, Box]]:
        """{camera: {thing: (ymin, xmin, ymax, xmax) in [0, 1]}} of what is visible, from MuJoCo's segmentation."""
        self._renderer.enable_segmentation_rendering()
        found = {name: self._boxes_in(self._draw(self._renderer, data, name)) for name in names}
        self._renderer.disable_segmentation_rendering()
        return found

    def positions(self, data: Any) -> dict[str, np.ndarray]:
        """Where the things are: f64[3] in metres."""
        return {
            name: np.concatenate([data.geom_xpos[geoms], data.site_xpos[sites]]).mean(0)
            for name, (geoms, sites) in self._things.items()
        }

    def close(self) -> None:
        self._renderer.close()
        if self._sharp is not None:
            self._sharp.close()

    def _boxes_in(self, segmentation: np.ndarray) -> dict[str, Box]:
        ids, kinds = np.moveaxis(segmentation, 2, 0)
        geom_ids = np.where(kinds == int(self._mujoco.mjtObj.mjOBJ_GEOM), ids, -1)
        site_ids = np.where(kinds == int(self._mujoco.mjtObj.mjOBJ_SITE), ids, -1)
        size, boxes = len(ids), {}
        for name in self._things:
            shown = self._is_geom[name][geom_ids] | self._is_site[name][site_ids]
            if shown.sum() >= _VISIBLE_PIXELS:
                rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
                boxes[name] = (rows[0] / size, columns[0] / size, (rows[-1] + 1) / size, (columns[-1] + 1) / size)
        return boxes

    def _draw(self, renderer: Any, data: Any, name: str) -> np.ndarray:
        groups = self._model.geom_group.copy()
        self._model.geom_group[:] = np.where(self._in_view(data, self._ids[name]), groups, _HIDDEN_GROUP)
        renderer.update_scene(data, camera=name, scene_option=self._options)
        self._model.geom_group[:] = groups
        image = renderer.render()
        return image[::-1, ::-1] if self._changed.get(name, Camera()).rotate else image

    def _in_view(self, data: Any, camera_id: int) -> np.ndarray:
        """bool[ngeom]: the bounding sphere touches the camera's pyramid. This halves the time of drawing."""
        centre = (data.geom_xpos - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)
        slope = np.tan(np.deg2rad(self._model.cam_fovy[camera_id]) / 2)
        depth, radius = -centre[:, 2], self._model.geom_rbound
        outside = (np.abs(centre[:, :2]) - slope * depth[:, None]).max(1) / np.sqrt(1 + slope**2)
        return (radius == 0) | ((outside <= radius) & (depth + radius > 0))  # radius 0: planes


def ids_of(model: Any, part: ModelPart) -> tuple[np.ndarray, np.ndarray]:
    """Geom and site ids of a part."""
    inside = {model.body(name).id for name in part.bodies}
    material = None if part.material is None else model.mat(part.material).id
    geoms = [model.geom(name).id for name in part.geoms]
    for geom in range(model.ngeom if part.bodies or part.material else 0):
        drawn = model.geom_group[geom] < 3
        belongs = not part.bodies or model.geom_bodyid[geom] in inside
        if drawn and belongs and material in (None, model.geom_matid[geom]):
            geoms.append(geom)
    return np.array(geoms, int), np.array([model.site(name).id for name in part.sites], int)
