"""Scripted experts of the desk, as MetaWorld's are: from the state of the moment alone, a place to go to and a grip.

An expert says its phase in words. Between things the hand travels above all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pi05_lightning.sim.desk.scene import HANDLE, State
from pi05_lightning.sim.metaworld.phases import apart

OPEN, SHUT = -1.0, 1.0
_TRAVEL = 0.25  # of the hand: its fingers reach 5 cm further down, and what they hold 7 cm
_GRASP = 0.055  # of the hand, when a block on the desk is between its fingers
_BESIDE = 0.05  # from the middle of what is pushed to the hand that will push it
_HELD = 0.78  # opening of the gripper around a block; without one it closes further


class Move(NamedTuple):
    """Where to go, f64[3]; how fast, in actions per metre; the gripper's effort; and what that is, in words."""

    to: np.ndarray
    gain: float
    effort: float
    words: str

    def action(self, hand: np.ndarray) -> np.ndarray:
        """f32[4] in [-1, 1], of one control step."""
        return np.clip([*self.gain * (self.to - hand), self.effort], -1.0, 1.0).astype(np.float32)


Expert = Callable[[State], Move]


def _at(place: np.ndarray, height: float) -> np.ndarray:
    return np.array([place[0], place[1], height])


def _moved(place: np.ndarray, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    return place + np.array([x, y, 0.0])[: len(place)]


def _travel(state: State, place: np.ndarray, effort: float, words: str) -> Move:
    """Above `place` at the height where nothing is in the way: up first, unless the hand is near or high already."""
    hand = state.hand
    if hand[2] < _TRAVEL - 0.04 and apart(hand, place) > 0.04:
        return Move(_at(hand, _TRAVEL + 0.03), 20.0, effort, words)
    return Move(_at(place, _TRAVEL), 10.0, effort, words)


def press(colour: str) -> Expert:
    def expert(state: State) -> Move:
        top = state.buttons[colour]
        if apart(state.hand, top) > 0.015:
            return _travel(state, top, SHUT, f"move above the {colour} button")
        return Move(_at(top, top[2] - 0.03), 15.0, SHUT, f"press the {colour} button")

    return expert


def open_drawer(state: State) -> Move:
    bar, hand = state.drawer, state.hand
    over = _moved(bar, y=-0.012)  # one finger behind the bar, one before it
    if apart(hand, over) > 0.02 and not (
        hand[2] < 0.12 and abs(hand[0] - bar[0]) < 0.03 and abs(hand[1] - over[1]) < 0.03
    ):
        return _travel(state, over, OPEN, "move above the drawer handle")
    if hand[2] > 0.105:
        return Move(_at(over, 0.085), 10.0, OPEN, "lower the gripper onto the drawer handle")
    return Move(_at(_moved(over, y=-0.05), 0.09), 15.0, OPEN, "pull the drawer open")


def close_drawer(state: State) -> Move:
    bar, hand = state.drawer, state.hand
    before = _moved(bar, y=-0.055)
    if hand[2] < 0.13 and abs(hand[0] - bar[0]) < 0.03 and -0.08 < hand[1] - bar[1] < -0.01:
        if hand[2] > 0.12 and hand[1] - bar[1] < -0.03:
            return Move(_at(before, 0.1), 10.0, SHUT, "lower the gripper before the drawer")
        return Move(_at(_moved(bar, y=0.05), 0.11), 15.0, SHUT, "push the drawer shut")
    if apart(hand, before) > 0.02:
        return _travel(state, before, SHUT, "move before the drawer")
    return Move(_at(before, 0.1), 10.0, SHUT, "lower the gripper before the drawer")


def turn_faucet(side: float) -> Expert:
    """side: 1 to the right, -1 to the left."""
    way, other = ("right", "left") if side > 0 else ("left", "right")
    lower = f"lower the gripper to the {other} of the faucet handle"

    def expert(state: State) -> Move:
        axis, hand, angle = state.faucet, state.hand, np.deg2rad(state.faucet_angle)
        out = np.array([np.sin(angle), -np.cos(angle)])  # from the axis along the handle
        across = side * np.array([np.cos(angle), np.sin(angle)])  # the way it shall turn
        offset = hand[:2] - axis[:2]
        along, ahead = float(offset @ out), float(offset @ across)
        start = axis[:2] + HANDLE * 0.85 * out - _BESIDE * across
        if hand[2] < 0.135 and -0.085 < ahead < -0.005 and 0.05 < along < 0.16:
            if hand[2] > 0.12 and ahead < -0.03:
                return Move(_at(start, 0.1), 10.0, SHUT, lower)
            further = angle + side * 0.35
            goal = axis[:2] + HANDLE * 0.8 * np.array([np.sin(further), -np.cos(further)])
            return Move(_at(goal, 0.105), 15.0, SHUT, f"push the faucet handle to the {way}")
        if apart(hand, start) > 0.02:
            return _travel(state, start, SHUT, f"move to the {other} of the faucet handle")
        return Move(_at(start, 0.1), 10.0, SHUT, lower)

    return expert


def push_block(colour: str, side: float) -> Expert:
    """side: 1 to the right, -1 to the left."""
    way, other = ("right", "left") if side > 0 else ("left", "right")
    lower = f"lower the gripper to the {other} of the {colour} block"

    def expert(state: State) -> Move:
        block, hand = state.blocks[colour], state.hand
        start = _moved(block, -side * (_BESIDE + 0.01))
        behind = side * (block[0] - hand[0])
        if hand[2] < 0.09 and 0.015 < behind < 0.09 and abs(hand[1] - block[1]) < 0.02:
            if hand[2] > 0.07 and behind > 0.045:
                return Move(_at(start, 0.055), 10.0, SHUT, lower)
            goal = np.array([block[0] + side * 0.03, block[1]])
            return Move(_at(goal, 0.06), 8.0, SHUT, f"push the {colour} block to the {way}")
        if apart(hand, start) > 0.012:
            return _travel(state, start, SHUT, f"move to the {other} of the {colour} block")
        return Move(_at(start, 0.055), 10.0, SHUT, lower)

    return expert


def store_block(colour: str, aside: float) -> Expert:
    """aside: metres from the middle of the drawer where it is dropped."""

    def expert(state: State) -> Move:
        block, hand = state.blocks[colour], state.hand
        goal = _moved(state.drop, aside)
        if state.in_drawer(colour) or (state.gripper >= _HELD and block[2] > 0.1 and apart(block, goal) < 0.03):
            return Move(_at(goal, _TRAVEL), 10.0, OPEN, f"drop the {colour} block into the drawer")
        between = apart(hand, block) < 0.025 and 0.0 < hand[2] - block[2] < 0.06
        if between and state.gripper < _HELD:
            if apart(hand, goal) < 0.012:
                return Move(_at(goal, _TRAVEL - 0.04), 10.0, OPEN, f"drop the {colour} block into the drawer")
            if hand[2] < _TRAVEL - 0.02:
                return Move(_at(hand, _TRAVEL + 0.02), 15.0, SHUT, f"lift the {colour} block")
            return Move(_at(goal, _TRAVEL), 10.0, SHUT, f"carry the {colour} block to the drawer")
        if apart(hand, block) > 0.012 and not between:
            return _travel(state, block, OPEN, f"move above the {colour} block")
        if hand[2] - block[2] > _GRASP - 0.022 + 0.008:
            return Move(_at(block, block[2] + _GRASP - 0.022), 10.0, OPEN, f"lower the gripper onto the {colour} block")
        return Move(_at(block, block[2] + _GRASP - 0.022), 10.0, SHUT, f"grasp the {colour} block")

    return expert
