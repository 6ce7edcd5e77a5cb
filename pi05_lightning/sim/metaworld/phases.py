"""What MetaWorld's scripted experts are doing at the moment, in words.

MetaWorld has no phases. These are the branches of `metaworld/policies/sawyer_*_v3_policy.py`: the same geometric
conditions, in metres, put into words. x points to the right, y away from the robot; "in front of" is the robot's side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Parsed = Mapping[str, np.ndarray]
"""An expert's own reading of the observation, by its names: hand_pos, goal_pos, drwr_pos, …"""

Phase = Callable[[Parsed], str]
Offset = tuple[float, float, float]

# of an expert: aside of the thing, and at its height
ONTO = ("move above", "lower the gripper onto")
LEFT_OF = ("move above", "lower the gripper to the left of")
RIGHT_OF = ("move above", "lower the gripper to the right of")
BEHIND = ("move above", "lower the gripper behind")
IN_FRONT = ("move above", "lower the gripper in front of")
BELOW = ("move below", "raise the gripper to")
LEVEL = ("move in front of", "move level with")

_WALL_X, _WALL_Y = (-0.15, 0.35), (0.60, 0.80)  # where the hand could hit the wall


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Horizontal distance in metres."""
    return float(np.linalg.norm(a[:2] - b[:2]))


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def approach(
    target: str,
    offset: Offset,
    xy: float,
    z: float,
    way: tuple[str, str],
    thing: str,
    act: str | Phase,
    lying: float = np.inf,
) -> Phase:
    """Most experts: go beside `target` + offset (within xy), then to its height (within z), then act.

    lying: a thing that is higher than this is in the hand, whatever its height.
    """

    def phase(parsed: Parsed) -> str:
        hand, goal = parsed["hand_pos"], parsed[target] + np.array(offset)
        if apart(hand, goal) > xy:
            return f"{way[0]} the {thing}"
        if abs(hand[2] - goal[2]) > z and goal[2] < lying:
            return f"{way[1]} the {thing}"
        return act if isinstance(act, str) else act(parsed)

    return phase


def above(target: str, offset: Offset, xy: float, thing: str, act: str) -> Phase:
    """Go above `target` + offset (within xy), then act."""
    return approach(target, offset, xy, np.inf, ONTO, thing, act)


def in_line(target: str, offset: Offset, atol: float, act: str) -> Phase:
    """Stand in front of `target` + offset, of the same x and height (each within atol), then act."""

    def phase(parsed: Parsed) -> str:
        off = parsed["hand_pos"] - (parsed[target] + np.array(offset))
        return act if max(abs(off[0]), abs(off[2])) <= atol else "move in front of the button"

    return phase


def lift(height: Callable[[Parsed], float], z: float, act: str, then: str) -> Phase:
    """Bring the hand to a height (within z), then the rest."""
    return lambda parsed: act if abs(parsed["hand_pos"][2] - height(parsed)) > z else then


def goal_height(parsed: Parsed) -> float:
    return parsed["goal_pos"][2]


def reach(parsed: Parsed) -> str:
    near = np.linalg.norm(parsed["hand_pos"] - parsed["goal_pos"]) < 0.05  # 0.05: the task's own success radius
    return "stay at the red ball" if near else "move to the red ball"


def reach_over_wall(parsed: Parsed) -> str:
    x, y, z = parsed["hand_pos"]
    if _within(x, (-0.1, 0.3)) and _within(y, _WALL_Y) and z < 0.25:
        return "rise above the wall"
    return reach(parsed)


def carry_over_wall(parsed: Parsed) -> str:
    x, y, z = parsed["hand_pos"]
    at_wall = _within(x, _WALL_X) and _within(y, _WALL_Y)
    if at_wall and z < 0.25:
        return "lift the puck above the wall"
    if at_wall and z < 0.35:
        return "carry the puck over the wall"
    off = abs(z - goal_height(parsed)) > 0.01
    return "bring the puck to the height of the blue ball" if off else "carry the puck to the blue ball"


def push_around_wall(parsed: Parsed) -> str:
    x, y = (parsed["obj_pos"] - np.array([0.005, 0.0, 0.0]))[:2]
    if _within(x, (-0.1, 0.3)) and _within(y, (0.65, 0.75)):
        return "push the puck to the left, around the wall"
    if (-0.15 < x < 0.05 or 0.15 < x < 0.35) and _within(y, (0.695, 0.755)):
        return "push the puck past the wall"
    return "push the puck to the green ball"


def press_over_wall(parsed: Parsed) -> str:
    x, y, z = parsed["hand_pos"] - (parsed["button_pos"] + np.array([0.0, 0.0, 0.04]))
    if abs(x) > 0.02:
        return "move in line with the button"
    if -y > 0.09:
        return "move over the wall"
    return "lower the gripper in front of the button" if abs(z) > 0.02 else "push the button in"


def assemble(parsed: Parsed) -> str:
    hand, nut = parsed["hand_pos"], parsed["wrench_pos"] + np.array([-0.02, 0.0, 0.0])
    peg = parsed["peg_pos"] + np.array([0.12, 0.0, 0.14])
    if apart(hand, nut) > 0.02:
        return "move above the nut"
    if apart(hand, peg) <= 0.02:
        return "lower the nut onto the peg"
    if abs(hand[2] - nut[2]) > 0.05:
        return "lower the gripper onto the nut"
    return "lift the nut" if abs(hand[2] - peg[2]) > 0.04 else "carry the nut above the peg"


def dunk(parsed: Parsed) -> str:
    low = abs(parsed["ball_pos"][2] + 0.01 - 0.35) > 0.025
    return "lift the basketball" if low else "carry the basketball to the basket"


def pick_from_bin(parsed: Parsed) -> str:
    hand, cube, there = parsed["hand_pos"], parsed["cube_pos"] + np.array([0.0, 0.0, 0.03]), np.array([0.12, 0.7])
    cube[1] = np.clip(cube[1], 0.675, 0.725)  # as the expert, who keeps the fingers inside the bin
    if apart(hand, cube) > 0.02:
        return "move above the cube"
    if abs(hand[2] - cube[2]) > 0.01:
        return "lower the gripper onto the cube"
    if apart(hand, there) <= 0.02:
        return "lower the cube into the blue bin"
    return "lift the cube" if hand[2] < 0.15 else "carry the cube over the blue bin"


def shut_door(parsed: Parsed) -> str:
    x, _, z = parsed["hand_pos"] - (parsed["door_pos"] + np.array([0.05, 0.12, 0.1]))
    if x > 0:
        return "raise the gripper above the door" if z < 0.2 else "move to the left of the door"
    return "lower the gripper to the left of the door" if abs(z) > 0.04 else "push the door shut"


def lock_door(parsed: Parsed) -> str:
    hand, lock = parsed["hand_pos"], parsed["lock_pos"] + np.array([-0.02, -0.02, 0.0])
    if apart(hand, lock) > 0.02:
        return "raise the gripper" if hand[2] < 0.25 else "move above the lock"
    return "lower the gripper onto the lock" if abs(hand[2] - lock[2]) > 0.02 else "push the lock down to the left"


def unlock_door(parsed: Parsed) -> str:
    hand, lock = parsed["hand_pos"], parsed["lock_pos"] + np.array([-0.04, -0.02, -0.03])
    if apart(hand, lock) > 0.02:
        return "lower the gripper" if hand[2] > 0.15 else "move to the left of the lock"
    return "push the lock to the right"


def shut_drawer(parsed: Parsed) -> str:
    _, y, z = parsed["hand_pos"] - (parsed["drwr_pos"] + np.array([0.0, 0.0, -0.02]))
    if y > 0:
        return "raise the gripper above the drawer handle" if z < 0.23 else "move in front of the drawer handle"
    return "lower the gripper in front of the drawer handle" if abs(z) > 0.04 else "push the drawer shut"


def hammer(parsed: Parsed) -> str:
    aside = np.linalg.norm(parsed["hand_pos"][[0, 2]] - np.array([0.05, 0.16])) > 0.02
    return "lift the hammer in line with the nail" if aside else "hit the nail with the hammer"


def insert_hand(parsed: Parsed) -> str:
    aside = apart(parsed["hand_pos"], parsed["goal_pos"]) > 0.04
    return "carry the cube above the hole" if aside else "lower the hand into the hole"


def insert_peg(parsed: Parsed) -> str:
    aside = np.linalg.norm(parsed["peg_pos"][1:] - np.array([parsed["goal_pos"][1], 0.16])) > 0.03
    return "lift the peg in line with the hole" if aside else "push the peg into the hole"


def unplug(parsed: Parsed) -> str:
    hand = parsed["hand_pos"]
    if apart(hand, parsed["peg_pos"] + np.array([-0.02, 0.0, 0.0])) > 0.04:
        return "move above the plug"
    return "lower the gripper onto the plug" if abs(hand[2] - 0.15) > 0.02 else "pull the plug out to the right"


def pull_plate(parsed: Parsed) -> str:
    inside = parsed["hand_pos"][1] > 0.7
    return "pull the plate out of the cabinet" if inside else "pull the plate to the red ball"


def shelve(parsed: Parsed) -> str:
    hand = parsed["hand_pos"]
    if abs(hand[0] - parsed["shelf_x"]) > 0.02:
        return "lift the block in front of the shelf"
    return "lift the block to the height of the shelf" if hand[2] < 0.30 else "carry the block onto the shelf"


def kick(parsed: Parsed) -> str:
    ball, off = parsed["ball_pos"] + np.array([0.0, 0.0, 0.03]), parsed["ball_pos"][0] - parsed["goal_pos"][0]
    place, side = ball + np.array([0.0, -0.03, 0.0]), "in front of"
    if abs(off) > 0.05:
        place, side = ball + np.array([np.copysign(0.03, off), 0.0, 0.0]), f"to the {'right' if off > 0 else 'left'} of"
    place[2] = 0.1 if apart(parsed["hand_pos"], ball) < 0.02 else 0.03
    away = np.linalg.norm(parsed["hand_pos"] - place) > 0.01
    return f"move {side} the soccer ball" if away else "push the soccer ball to the goal"


def use_stick(grip: float, thermos_offset: Offset, act: str) -> Phase:
    """Take the stick at `grip` m beside its middle, bring it to the thermos, then act."""

    def phase(parsed: Parsed) -> str:
        hand, stick = parsed["hand_pos"], parsed["stick_pos"] + np.array([grip, 0.0, 0.03])
        x, y, z = np.abs(stick - (parsed["obj_pos"] + np.array(thermos_offset)))
        if x <= 0.04:
            return act
        if apart(hand, stick) > 0.02:
            return "move above the stick"
        if abs(hand[2] - stick[2]) > 0.02:
            return "lower the gripper onto the stick"
        if y > 0.02:
            return "bring the stick in line with the thermos"
        return "lift the stick to the thermos" if z > 0.02 else "push the stick against the thermos"

    return phase


def sweep(parsed: Parsed) -> str:
    if parsed["hand_pos"][0] >= 0.2:
        return _SWEEP
    return _to_sweep(parsed)


_SWEEP = "sweep the cube off the table to the right"
_to_sweep = approach("cube_pos", (0.0, 0.0, 0.015), 0.04, 0.04, ONTO, "cube", _SWEEP)
