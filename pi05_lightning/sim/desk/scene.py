"""The desk: a MuJoCo model made of MetaWorld's arm and things, where they may stand, and what their state is.

The desk holds a drawer, a faucet, three buttons and two blocks, all of them always. Metres; x to the right, y away from
the robot, z up. Left and right are the robot's, and those of the camera `desk`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lightning.sim.metaworld.environment import import_metaworld
from pi05_lightning.sim.rendering import ModelPart, bodies

BUTTONS = ("red", "yellow", "blue")
BLOCKS = ("green", "purple")
_COLOURS = {
    "red": (1.0, 0.0, 0.0, 1.0),
    "yellow": (1.0, 0.85, 0.0, 1.0),
    "blue": (0.05, 0.2, 1.0, 1.0),
    "green": (0.1, 0.8, 0.15, 1.0),
    "purple": (0.7, 0.15, 0.75, 1.0),
}
_DRAWER_SIZE, _FAUCET_SIZE, _BUTTON_SIZE = 0.85, 0.8, 0.42  # of MetaWorld's
BLOCK = 0.022  # half an edge
DRAWER_TRAVEL = 0.16 * _DRAWER_SIZE
DRAWER_WIDTH = 0.084 * _DRAWER_SIZE  # half of what is inside
BAR = 0.16 * _DRAWER_SIZE  # from the drawer's middle to the bar of its handle, towards the robot
_BAR_HEIGHT = 0.09 * _DRAWER_SIZE
_CASE_FRONT = 0.1 * _DRAWER_SIZE
_INNER_FRONT = 0.074 * _DRAWER_SIZE
_CAP = 0.194 * _BUTTON_SIZE  # from the middle of a button's box up to the top of the button
_BUTTON_TRAVEL = 0.06 * _BUTTON_SIZE
HANDLE = 0.15 * _FAUCET_SIZE  # from the faucet's axis to where its handle is pushed
_HANDLE_HEIGHT = 0.125 * _FAUCET_SIZE
_FAUCET_RANGE = 70.0  # degrees to each side: what stands behind it leaves no more room for a hand
HAND_START = (0.0, 0.45, 0.25)
HAND_LOW, HAND_HIGH = np.array([-0.4, 0.4, 0.05]), np.array([0.4, 1.0, 0.4])
CAMERA = "desk"

OBJECTS: Mapping[str, ModelPart] = {
    "drawer": bodies("drawer_link", "drawercase_link"),
    "drawer handle": ModelPart(geoms=("objGeom",)),
    "faucet": bodies("faucet/faucet_link", "faucet/faucet_link2"),
    "faucet handle": bodies("faucet/faucet_link2"),
    **{f"{colour} button": bodies(f"{colour}/buttonbox", f"{colour}/button") for colour in BUTTONS},
    **{f"{colour} block": ModelPart(geoms=(f"{colour} block",)) for colour in BLOCKS},
}


def named(words: str) -> str:
    """The last thing of `OBJECTS` that a sentence names, by its longest name."""
    found = [name for name in OBJECTS if name in words]
    return max(found, key=lambda name: (words.rindex(name), len(name)))


def place_words(position: np.ndarray) -> str:
    """Where on the desk f64[3] is: no thing begins near the lines between them."""
    x, y = position[:2]
    row = "front" if y < 0.575 else "middle" if y < 0.72 else "back"
    column = "left" if x < -0.11 else "right" if x > 0.11 else "centre"
    return f"at the {row} {column}"


@dataclass(frozen=True)
class Places:
    """Where everything stands at the beginning: f64[2] of x and y."""

    drawer: np.ndarray
    faucet: np.ndarray
    buttons: Mapping[str, np.ndarray]
    blocks: Mapping[str, np.ndarray]
    drawer_open: float
    """Share of its way."""
    faucet_angle: float
    """Degrees; 0 points to the robot, 90 to the right."""


def draw_places(rng: np.random.Generator) -> Places:
    """Which side, which slot and where in it: nothing of it depends on what will be asked for."""
    side = rng.choice([-1.0, 1.0])

    def near(x: float, y: float, by_x: float, by_y: float) -> np.ndarray:
        return np.array([side * x, y]) + rng.uniform(-1.0, 1.0, 2) * (by_x, by_y)

    slots = [near(-0.03, 0.9, 0.01, 0.015), near(-0.27, 0.55, 0.015, 0.015), near(0.28, 0.55, 0.01, 0.015)]
    rows = [near(0.0, 0.5, 0.04, 0.006), near(0.0, 0.595, 0.04, 0.006)]
    return Places(
        drawer=near(0.165, 0.893, 0.015, 0.008),
        faucet=near(-0.19, 0.79, 0.015, 0.015),
        buttons=dict(zip(BUTTONS, (slots[i] for i in rng.permutation(3)), strict=True)),
        blocks=dict(zip(BLOCKS, (rows[i] for i in rng.permutation(2)), strict=True)),
        drawer_open=rng.uniform(0.62, 0.76),
        faucet_angle=rng.uniform(-15.0, 15.0),
    )


@dataclass(frozen=True)
class State:
    """What is true on the desk at a moment, in metres, degrees and shares."""

    hand: np.ndarray
    """f64[3]"""
    gripper: float
    """Opening in [0, 1]."""
    drawer: np.ndarray
    """f64[3]: the middle of the bar of its handle."""
    drawer_open: float
    drop: np.ndarray
    """f64[2]: the middle of what is open of the drawer."""
    faucet: np.ndarray
    """f64[3]: its axis, at the height of its handle."""
    faucet_angle: float
    buttons: Mapping[str, np.ndarray]
    """f64[3]: the top of each."""
    pressed: Mapping[str, float]
    blocks: Mapping[str, np.ndarray]
    """f64[3]: the middle of each."""

    def in_drawer(self, colour: str) -> bool:
        block = self.blocks[colour]
        middle = self.drawer[1] + BAR
        inside = abs(block[0] - self.drawer[0]) < DRAWER_WIDTH and abs(block[1] - middle) < _INNER_FRONT
        return bool(inside and block[2] < 0.1)


class Tabletop:
    """The model of a desk with its state in MuJoCo: the arm follows a place that is sent to it, as in MetaWorld."""

    def __init__(self) -> None:
        self.model: Any = copy.copy(_model())
        import mujoco  # rendering is chosen before its first import

        self._mujoco = mujoco
        self.data: Any = mujoco.MjData(self.model)
        for _ in range(80):
            self._send(np.array(HAND_START), -1.0)
        self._rest = self.data.qpos.copy()

    def reset(self, places: Places) -> None:
        """Put everything in its place, the hand too."""
        model, data = self.model, self.data
        self._mujoco.mj_resetData(model, data)
        data.qpos[:] = self._rest
        model.body("drawer").pos[:2] = places.drawer
        model.body("faucet/faucetBase").pos[:2] = places.faucet
        for colour, place in places.buttons.items():
            model.body(f"{colour}/box").pos[:2] = place
            data.joint(f"{colour}/btnbox_joint").qpos[:] = 0.0
        for colour, place in places.blocks.items():
            data.joint(f"{colour} block").qpos[:] = [*place, BLOCK, 1.0, 0.0, 0.0, 0.0]
        data.joint("goal_slidey").qpos[:] = -places.drawer_open * DRAWER_TRAVEL
        data.joint("faucet/knob_Joint_1").qpos[:] = np.deg2rad(places.faucet_angle)
        for _ in range(10):
            self._send(np.array(HAND_START), -1.0)

    def act(self, action: np.ndarray) -> None:
        """One control step of 1/80 s: move the place that the hand follows by 1 cm · action[:3], close by action[3]."""
        self._send(np.clip(self.data.mocap_pos[0] + 0.01 * action[:3], HAND_LOW, HAND_HIGH), float(action[3]))

    def place_hand(self, position: np.ndarray, effort: float) -> None:
        """Bring the hand near `position` f64[3] at once, not as a robot would."""
        for _ in range(20):
            self._send(position, effort)

    def _send(self, position: np.ndarray, effort: float) -> None:
        self.data.mocap_pos[0] = position
        self.data.mocap_quat[0] = (1.0, 0.0, 1.0, 0.0)
        self.data.ctrl[:] = (effort, -effort)
        self._mujoco.mj_step(self.model, self.data, 5)

    @property
    def fingertips(self) -> np.ndarray:
        """f64[3]: the middle between them."""
        return (self.data.site("rightEndEffector").xpos + self.data.site("leftEndEffector").xpos) / 2

    def state(self) -> State:
        self._mujoco.mj_kinematics(self.model, self.data)
        data, model = self.data, self.model
        link = data.body("drawer_link").xpos
        front = model.body("drawer").pos[1] - _CASE_FRONT
        axis = data.body("faucet/faucet_link2").xpos
        apart = np.linalg.norm(data.body("rightclaw").xpos - data.body("leftclaw").xpos)
        depth = {colour: float(data.joint(f"{colour}/btnbox_joint").qpos[0]) for colour in BUTTONS}
        return State(
            hand=data.body("hand").xpos.copy(),
            gripper=float(np.clip(apart / 0.1, 0.0, 1.0)),
            drawer=np.array([link[0], link[1] - BAR + 0.01 * _DRAWER_SIZE, _BAR_HEIGHT]),
            drawer_open=float(-data.joint("goal_slidey").qpos[0]) / DRAWER_TRAVEL,
            drop=np.array([link[0], (front + link[1] - _INNER_FRONT) / 2]),
            faucet=np.array([*axis[:2], _HANDLE_HEIGHT]),
            faucet_angle=float(np.rad2deg(data.joint("faucet/knob_Joint_1").qpos[0])),
            buttons={c: data.body(f"{c}/button").xpos + np.array([0.0, 0.0, _CAP]) for c in BUTTONS},
            pressed={colour: -value / _BUTTON_TRAVEL for colour, value in depth.items()},
            blocks={colour: data.body(f"{colour} block").xpos.copy() for colour in BLOCKS},
        )


@cache
def _model() -> Any:
    """The model, compiled once in a process."""
    import_metaworld()
    import mujoco

    spec = _spec("drawer")
    _scale(spec, spec.body("drawer"), _DRAWER_SIZE)
    boxes = dict.fromkeys(BUTTONS, ("button_press_topdown", "box", _BUTTON_SIZE, 0.114 * _BUTTON_SIZE))
    for name, (file, body, size, height) in {"faucet": ("faucet", "faucetBase", _FAUCET_SIZE, 0.0), **boxes}.items():
        other = _spec(file)
        _scale(other, other.body(body), size)
        spec.worldbody.add_frame().attach_body(other.body(body), f"{name}/", "").pos = (0.0, 0.0, height)
    spec.joint("faucet/knob_Joint_1").range = np.deg2rad([-_FAUCET_RANGE, _FAUCET_RANGE])
    for material in spec.materials:
        owner, _, name = material.name.rpartition("/")
        if name in ("btn_red", "btn_yellow"):
            shade = 1.0 if name == "btn_red" else 0.8
            material.rgba = np.array(_COLOURS[owner]) * (shade, shade, shade, 1.0)
        elif name == "drawer_beige":
            material.rgba = (0.85, 0.82, 0.75, 1.0)
        elif name == "faucet_red":
            material.rgba = (0.08, 0.08, 0.08, 1.0)
    for site in spec.sites:
        site.group = 5  # not drawn
    for colour in BLOCKS:
        name = f"{colour} block"
        block = spec.worldbody.add_body(name=name, mass=0.2, inertia=(6e-5,) * 3, explicitinertial=True)
        block.add_freejoint(name=name)
        block.add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=(BLOCK,) * 3,
            rgba=_COLOURS[colour],
            friction=(1.0, 0.1, 0.002),
            condim=4,
            solref=(0.01, 1.0),
            solimp=(0.99, 0.99, 0.01, 0.5, 2.0),
        )
    # from behind the desk down: what is held high hides what lies nearer to the robot, not what it reaches for
    half = math.atan2(0.69 - 1.2, 1.2) / 2  # of its turn about x, from straight down to the middle of the desk
    quaternion = (math.cos(half), math.sin(half), 0.0, 0.0)
    spec.worldbody.add_camera(name=CAMERA, pos=(0.0, 1.2, 1.2), quat=quaternion, fovy=32)
    model = spec.compile()
    model.eq_data[model.eq_type == mujoco.mjtEq.mjEQ_WELD] = [*[0.0] * 6, -1.0, *[0.0] * 3, 5.0]  # as MetaWorld has it
    return model


def _spec(file: str) -> Any:
    import mujoco

    folder = Path(import_metaworld().__path__[0]) / "assets" / "sawyer_xyz"
    return mujoco.MjSpec.from_file(str(folder / f"sawyer_{file}.xml"))


def _scale(spec: Any, top: Any, size: float) -> None:
    """Make a body with all that is in it `size` times as large."""
    import mujoco

    meshes = set[str]()
    for body in (top, *top.find_all("body")):
        if body is not top:
            body.pos = size * body.pos
        body.ipos = size * body.ipos
        for geom in body.geoms:
            geom.pos, geom.size = size * geom.pos, size * geom.size
            meshes.add(geom.meshname)
        for site in body.sites:
            site.pos = size * site.pos
        for joint in body.joints:
            if joint.type == mujoco.mjtJoint.mjJNT_SLIDE:
                joint.range = size * joint.range
    for mesh in spec.meshes:
        if mesh.name in meshes:
            mesh.scale = size * mesh.scale
