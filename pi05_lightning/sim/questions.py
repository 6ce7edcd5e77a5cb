"""Questions, answers and captions from the simulator's truth."""

from __future__ import annotations

import numpy as np

from pi05_lightning.sim.metaworld import Box, MetaWorldEnv
from pi05_lightning.types import Answer

_CLOSED = 0.6  # of the gripper's opening in [0, 1]: experts that close it reach 0.5, those that open it 1.0
_BESIDE = 0.02  # metres within which two things are said to be at the same place along an axis


def box_text(box: Box) -> str:
    """`<locYYYY>` for ymin, xmin, ymax, xmax, in 1024 steps over the image (PaliGemma's convention)."""
    return "".join(f"<loc{min(int(edge * 1024), 1023):04d}>" for edge in box)


def answers(env: MetaWorldEnv) -> tuple[Answer, ...]:
    """All that is asked about a frame: a box for each visible object in each camera, directions, the gripper."""
    boxes, places = env.boxes(), env.positions()
    asked = [
        Answer(f"detect the {name}", box_text(box), camera)
        for camera in env.cameras
        for name, box in boxes[camera].items()
    ]
    first = env.cameras[0]
    for name in list(env.language.objects)[:1]:
        where = direction(places[name] - places["gripper"])
        asked.append(Answer(f"where is the {name} from the gripper?", where, first))
    closed = "yes" if env.state[3] < _CLOSED else "no"
    asked.append(Answer("is the gripper closed?", closed, first))
    return tuple(asked)


def direction(offset: np.ndarray) -> str:
    """Metres (right, away, up) in words, such as `left, ahead, below`; `here` when all three are small."""
    words = [
        ("right", "left"),
        ("ahead", "behind"),
        ("above", "below"),
    ]
    said = [pair[int(value < 0)] for value, pair in zip(offset, words, strict=True) if abs(value) > _BESIDE]
    return ", ".join(said) or "here"


def caption(env: MetaWorldEnv, camera: str, boxes: dict[str, Box]) -> str:
    """One sentence about what a camera sees and where in its image."""
    seen = [f"{'' if name == 'gripper' else 'a '}{name} {image_place(box)}" for name, box in boxes.items()]
    return f"{camera}: " + (", ".join(seen) if seen else "a table")


def image_place(box: Box) -> str:
    """Where in the image a box is: its third in both directions."""
    y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return f"{('at the top', 'in the middle', 'at the bottom')[int(y * 3)]} {('left', 'centre', 'right')[int(x * 3)]}"
