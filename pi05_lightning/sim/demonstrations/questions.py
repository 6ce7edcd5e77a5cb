"""Questions, answers and captions from the simulator's truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pi05_lightning.sim.environment import Demonstrator
from pi05_lightning.types import Answer, Box, box_to_text

_CLOSED = 0.7  # of the gripper's opening in [0, 1]; closed on nothing it is 0.5, open 1.0
_BESIDE = 0.02  # metres within which two things are at the same place along an axis
_WRIST_CAMERA = "gripperPOV"  # sees the gripper always at the same place: nothing to ask


def answers(
    env: Demonstrator, boxes: Mapping[str, Mapping[str, Box]], instruction: str | None = None
) -> tuple[Answer, ...]:
    """All that is asked about a frame: a box for each visible object in each camera, where things are, the gripper.

    boxes: `env.boxes()` of the cameras to ask about; questions that need no box go to the first of them.
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
        asked.append(Answer(f"where is the {name}?", direction(places[name] - places["gripper"]), camera))
    asked += [Answer(question, answer, camera) for question, answer in env.facts()]
    asked.append(Answer("is the gripper closed?", "yes" if env.state[3] < _CLOSED else "no", camera))
    return tuple(asked)


def direction(offset: np.ndarray) -> str:
    """An offset from the gripper in metres (x right, y away from the robot, z up) in words: `left, ahead, below`."""
    words = (("right", "left"), ("ahead", "behind"), ("above", "below"))
    parts = [pair[int(value < 0)] for pair, value in zip(words, offset, strict=True) if abs(value) > _BESIDE]
    return ", ".join(parts) or "at the gripper"


def caption(boxes: Mapping[str, Box]) -> str:
    """What an image shows and where: `a robot arm, a drawer at the top left, a drawer handle in the middle`."""
    seen = [f"a {name} {image_place(box)}" for name, box in boxes.items() if name != "gripper"]
    return ", ".join(["a robot arm over a table", *seen])


def image_place(box: Box) -> str:
    """The ninth of the image in which the centre of a box lies."""
    row = ("top", "middle", "bottom")[int((box[0] + box[2]) * 1.5)]
    column = ("left", "centre", "right")[int((box[1] + box[3]) * 1.5)]
    return "in the middle" if (row, column) == ("middle", "centre") else f"at the {row} {column}"
