"""Questions, answers and captions from the simulator's truth, of places where an image determines them.

Where a few pixels would change a place, one of what it is about is not seen, or a thing is cut off, no place is told.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pi05_lightning.sim.environment import Demonstrator
from pi05_lightning.types import Answer, Box, box_to_text

_CLOSED, _OPEN = 0.65, 0.75  # of the gripper's opening in [0, 1]; closed on nothing it is 0.5, open 1.0
_BESIDE, _APART = 0.01, 0.05  # metres along an axis: two things are at the same place, or one is beyond the other
_BORDER = 0.03  # of the image, beside the border of a ninth
_WRIST_CAMERA = "gripperPOV"  # sees the gripper always at the same place: nothing to ask
_FROM_ABOVE = "topview"  # sees no height, and no fingers, as the hand is above them


def answers(
    env: Demonstrator, boxes: Mapping[str, Mapping[str, Box]], instruction: str | None = None
) -> tuple[Answer, ...]:
    """All that is asked about a frame: a box for each visible object in each camera, where things are, the gripper.

    boxes: `env.boxes()` of the cameras to ask about; a question that asks for no box goes to the first that can tell.
    instruction: as it is told; its answer is the box of the thing that it is about.
    """
    target = env.target
    asked = [
        Answer(instruction, box_to_text(seen[target]), camera)
        for camera, seen in boxes.items()
        if instruction is not None and target is not None and target in seen
    ]
    asked += [
        Answer(f"detect the {name}", box_to_text(box), camera)
        for camera, seen in boxes.items()
        for name, box in seen.items()
        if (name, camera) != ("gripper", _WRIST_CAMERA)
    ]
    camera, places = next(iter(boxes)), env.positions()
    for name in env.objects:
        where = direction((places[name] - places["gripper"])[: 2 if camera == _FROM_ABOVE else 3])
        if {name, "gripper"} <= boxes[camera].keys() and where is not None and not is_cut_off(boxes[camera][name]):
            asked.append(Answer(f"where is the {name}?", where, camera))
    for question, answer, things in env.facts():
        showing = next((name for name, seen in boxes.items() if {*things} <= seen.keys()), None)
        asked += [Answer(question, answer, showing)] if showing else []
    looking = next((name for name, seen in boxes.items() if name != _FROM_ABOVE and "gripper" in seen), None)
    if looking and len(env.state) == 4 and not _CLOSED <= (opening := env.state[3]) <= _OPEN:
        asked.append(Answer("is the gripper closed?", "yes" if opening < _CLOSED else "no", looking))
    return tuple(asked)


def direction(offset: np.ndarray) -> str | None:
    """An offset from the gripper in metres (x right, y away from the robot, z up) in words: `left, ahead, below`.

    offset: f64[3], or f64[2] where the height is not seen.
    None where it is not apart along each of them, nor at the gripper; and for what may be below the gripper. To see
    that two things are level along one axis alone takes a centimetre, which is less than a pixel.
    """
    if np.all(np.abs(offset) <= _BESIDE) and len(offset) == 3:
        return "at the gripper"
    if np.any(np.abs(offset) < _APART):
        return None
    words = (("right", "left"), ("ahead", "behind"), ("above", "below"))
    return ", ".join(pair[int(value < 0)] for pair, value in zip(words, offset, strict=False))


def caption(boxes: Mapping[str, Box]) -> str | None:
    """What an image shows and where: `a robot arm, a drawer at the top left, a drawer handle in the middle`.

    None where it shows none of them, the place of one is not clear, or one is cut off: what it is does not show then.
    """
    things = {name: box for name, box in boxes.items() if name != "gripper"}
    places = {name: image_place(box) for name, box in things.items()}
    if not things or None in places.values() or any(map(is_cut_off, things.values())):
        return None
    return ", ".join(["a robot arm over a table", *(f"a {name} {place}" for name, place in places.items())])


def is_cut_off(box: Box) -> bool:
    """Whether a box reaches the border of the image."""
    return min(box[:2]) <= 0 or max(box[2:]) >= 1


def image_place(box: Box) -> str | None:
    """The ninth of the image in which the centre of a box lies; None beside its border."""
    centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    if any(abs(value - border / 3) < _BORDER for value in centre for border in (1, 2)):
        return None
    row = ("top", "middle", "bottom")[int(centre[0] * 3)]
    column = ("left", "centre", "right")[int(centre[1] * 3)]
    return "in the middle" if (row, column) == ("middle", "centre") else f"at the {row} {column}"
