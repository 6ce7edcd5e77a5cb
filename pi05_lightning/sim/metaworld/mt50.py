"""MT50 by the protocol that LeRobot and SmolVLA publish: all 50 tasks of MetaWorld, one camera, LeRobot's sentences.

Source: `lerobot/envs/metaworld.py` and its `metaworld_config.json`. Initial states are drawn from MetaWorld's own
uniform distribution there as here. An episode has failed after 400 control steps of 1/80 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pi05_lightning.sim.environment import View, action_repeat
from pi05_lightning.sim.metaworld.environment import MetaWorld, MetaWorldEnvironment
from pi05_lightning.sim.rendering import Camera
from pi05_lightning.sim.sawyer import CONTROL_HZ

if TYPE_CHECKING:
    from pi05_lightning.data.robot import Robot

MAX_SECONDS = 400 / CONTROL_HZ
CORNER2 = Camera(pos=(0.75, 0.075, 0.7), rotate=True)

TASKS: dict[str, dict[str, str]] = {
    "easy": {
        "button-press-v3": "Press a button",
        "button-press-topdown-v3": "Press a button from the top",
        "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
        "button-press-wall-v3": "Bypass a wall and press a button",
        "coffee-button-v3": "Push a button on the coffee machine",
        "dial-turn-v3": "Rotate a dial 180 degrees",
        "door-close-v3": "Close a door with a revolving joint",
        "door-lock-v3": "Lock the door by rotating the lock clockwise",
        "door-open-v3": "Open a door with a revolving joint",
        "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
        "drawer-close-v3": "Push and close a drawer",
        "drawer-open-v3": "Open a drawer",
        "faucet-close-v3": "Rotate the faucet clockwise",
        "faucet-open-v3": "Rotate the faucet counter-clockwise",
        "handle-press-v3": "Press a handle down",
        "handle-press-side-v3": "Press a handle down sideways",
        "handle-pull-v3": "Pull a handle up",
        "handle-pull-side-v3": "Pull a handle up sideways",
        "lever-pull-v3": "Pull a lever down 90 degrees",
        "plate-slide-v3": "Slide a plate into a cabinet",
        "plate-slide-back-v3": "Get a plate from the cabinet",
        "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
        "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
        "reach-v3": "Reach a goal position",
        "reach-wall-v3": "Bypass a wall and reach a goal",
        "window-close-v3": "Push and close a window",
        "window-open-v3": "Push and open a window",
        "peg-unplug-side-v3": "Unplug a peg sideways",
    },
    "medium": {
        "basketball-v3": "Dunk the basketball into the basket",
        "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
        "box-close-v3": "Grasp the cover and close the box with it",
        "coffee-pull-v3": "Pull a mug from a coffee machine",
        "coffee-push-v3": "Push a mug under a coffee machine",
        "hammer-v3": "Hammer a screw on the wall",
        "peg-insert-side-v3": "Insert a peg sideways",
        "push-wall-v3": "Bypass a wall and push a puck to a goal",
        "soccer-v3": "Kick a soccer into the goal",
        "sweep-v3": "Sweep a puck off the table",
        "sweep-into-v3": "Sweep a puck into a hole",
    },
    "hard": {
        "assembly-v3": "Pick up a nut and place it onto a peg",
        "hand-insert-v3": "Insert the gripper into a hole",
        "pick-out-of-hole-v3": "Pick up a puck from a hole",
        "pick-place-v3": "Pick and place a puck to a goal",
        "push-v3": "Push the puck to a goal",
        "push-back-v3": "Push the puck to a goal",
    },
    "very_hard": {
        "shelf-place-v3": "Pick and place a puck onto a shelf",
        "disassemble-v3": "Pick a nut out of a peg",
        "stick-pull-v3": "Grasp a stick and pull a box with the stick",
        "stick-push-v3": "Grasp a stick and push a box using the stick",
        "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    },
}
"""{difficulty: {task: instruction}}. Two tasks share theirs: the picture tells them apart."""

SENTENCES = {task: sentence for tasks in TASKS.values() for task, sentence in tasks.items()}


@dataclass(frozen=True)
class MT50(MetaWorld):
    """MetaWorld's 50 tasks by the protocol that LeRobot and SmolVLA publish."""

    cameras = ("corner2",)
    demonstrated = tuple(SENTENCES)

    def tasks(self, robot: Robot) -> list[str]:
        """Those that the policy was trained on, from their instructions; all 50 where it knows none."""
        known = set(robot.tasks)
        return [task for task, sentence in SENTENCES.items() if sentence in known] or list(SENTENCES)

    def sentences(self, task: str) -> Sequence[str]:
        return (SENTENCES[task],)

    def groups(self) -> Mapping[str, Sequence[str]]:
        return {difficulty: tuple(tasks) for difficulty, tasks in TASKS.items()}

    def open(self, task: str, view: View) -> MetaWorldEnvironment:
        repeat = action_repeat("MetaWorld", CONTROL_HZ, view)
        changed = {"corner2": CORNER2}
        return MetaWorldEnvironment(task, view.image_size, view.cameras, repeat, SENTENCES, changed, MAX_SECONDS)
