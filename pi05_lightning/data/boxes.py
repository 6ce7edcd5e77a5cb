"""Boxes as datasets write them, as numbers or in text, to PaliGemma's coordinate tokens.

`<locYYYY>` four times is ymin, xmin, ymax, xmax in 1024 steps over the image; twice, a point's y and x.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import batched
from typing import Any, Literal, get_args

import torch
from torchvision.ops import box_convert

from pi05_lightning.data.errors import BadFrame
from pi05_lightning.data.tokenizer import LOCATIONS
from pi05_lightning.types import NUM_LOC, Box, Frame, Letterbox, box_to_text, edges_to_text

BoxOrder = Literal["xyxy", "yxyx", "xywh", "cxcywh"]
"""Corners (x or y first), the top left corner with width and height, or the centre with them."""
NOTHING = "none"  # the answer where nothing was detected: an empty one would look like a mistake
_LOCATION = re.compile(r"<loc(\d+)>")
_RUN = re.compile(r"(?:<loc\d+>)+")


def to_box(values: Sequence[float], order: BoxOrder, height: float, width: float) -> Box:
    """(ymin, xmin, ymax, xmax) in [0, 1] of four numbers in an image that is `height` by `width` of their units.

    Raises ValueError for a box that is outside the image, inside out, or not four finite numbers.
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or order not in get_args(BoxOrder):
        raise ValueError(f"the box {list(values)} ({order}) is not four numbers in one of {get_args(BoxOrder)}")
    if order == "yxyx":
        top, left, bottom, right = numbers
    else:
        left, top, right, bottom = box_convert(torch.tensor(numbers, dtype=torch.float64), order, "xyxy").tolist()
    slack = 1e-6  # of the image's size: centre and size, added up, may round past its edge
    box = (top / height, left / width, bottom / height, right / width)
    ymin, xmin, ymax, xmax = (round(edge) if abs(edge - round(edge)) < slack else edge for edge in box)
    if not (0 <= ymin <= ymax <= 1 and 0 <= xmin <= xmax <= 1):
        raise ValueError(
            f"the box {list(values)} ({order}) is not inside the image, {width:g} wide and {height:g} high"
        )
    return ymin, xmin, ymax, xmax


def detections(boxes: Sequence[Box], labels: Sequence[str | None]) -> str:
    """`<loc…>` four times and a label for each box, as PaliGemma names what it detects: "… a cup ; … a plate"."""
    return " ; ".join(
        f"{box_to_text(box)} {label}" if label else box_to_text(box) for box, label in zip(boxes, labels, strict=True)
    )


def from_lerobot(answer: str, height: float, width: float) -> str:
    """What LeRobot's annotator wrote as an answer, with its boxes and points as coordinate tokens.

    It writes {"detections": [{"label", "bbox_format", "bbox"}, …]} and {"label", "point_format", "point"} as JSON;
    any other answer is returned as it is.  height, width: the image's, in the units of these coordinates.
    Raises ValueError for coordinates outside the image, or in another format.
    """
    if not answer.lstrip().startswith("{"):
        return answer
    try:
        found: dict[str, Any] = json.loads(answer)
    except json.JSONDecodeError:
        return answer
    if isinstance(found.get("detections"), list):
        seen = found["detections"]
        boxes = [to_box(one.get("bbox") or (), one.get("bbox_format", "xyxy"), height, width) for one in seen]
        return detections(boxes, [one.get("label") for one in seen]) or NOTHING
    if "point" in found:
        point, order = found["point"], found.get("point_format", "xy")
        if len(point) != 2 or order not in ("xy", "yx"):
            raise ValueError(f"the point {point} ({order}) is not two numbers as xy or yx")
        x, y = point if order == "xy" else reversed(point)
        top, left, *_ = to_box((x, y, x, y), "xyxy", height, width)
        spelled = edges_to_text((top, left))
        return f"{spelled} {found['label']}" if found.get("label") else spelled
    return answer


def to_model(text: str, letterbox: Letterbox) -> str:
    """A text whose places are shares of a camera's picture, with them as shares of the image that the model sees."""
    top, left, bottom, right = letterbox.window
    return _moved(text, ((bottom - top, top), (right - left, left)))


def to_picture(text: str, letterboxes: Iterable[Letterbox]) -> str:
    """The inverse of `to_model`, for a text about images with these letterboxes; beside a picture becomes its edge.

    Where they differ, nothing tells which image is meant, and the text stays as it is.
    """
    alike = set(letterboxes)
    if len(alike) != 1:
        return text
    top, left, bottom, right = alike.pop().window
    return _moved(text, ((1 / (bottom - top), -top / (bottom - top)), (1 / (right - left), -left / (right - left))))


def frame_to_model(frame: Frame, letterboxes: Mapping[str, Letterbox]) -> Frame:
    """A frame with the places in its texts where the model sees them, given each camera's letterbox.

    What names no camera is about all of the images.  Raises BadFrame when it has a place, and the images differ in
    shape, or when an answer is about a camera without an image.
    """

    def moved(text: str, camera: str | None = None) -> str:
        if not _LOCATION.search(text):
            return text
        about = set(letterboxes.values()) if camera is None else {letterboxes[camera]}
        if len(about) > 1:
            raise BadFrame(f"{text!r} names a place in images of several shapes: say in which camera's, or drop it")
        return to_model(text, *about) if about else text

    strangers = sorted({answer.camera for answer in frame.answers if answer.camera is not None} - letterboxes.keys())
    if strangers:
        raise BadFrame(f"it has a question about the camera {strangers[0]!r}, and images of {', '.join(letterboxes)}")
    answers = [
        replace(a, question=moved(a.question, a.camera), answer=moved(a.answer, a.camera)) for a in frame.answers
    ]
    subtask = None if frame.subtask is None else moved(frame.subtask)
    return replace(frame, task=moved(frame.task), subtask=subtask, answers=tuple(answers))


def _moved(text: str, axes: tuple[tuple[float, float], tuple[float, float]]) -> str:
    """The coordinate tokens of a text scaled and shifted, (scale, shift) for y and for x, which take turns in a run."""

    def run(match: re.Match[str]) -> str:
        steps = enumerate(map(int, _LOCATION.findall(match.group())))
        edges = (axes[i % 2][0] * (step + 0.5) / NUM_LOC + axes[i % 2][1] for i, step in steps)
        return edges_to_text(min(max(edge, 0.0), 1.0) for edge in edges)

    return _RUN.sub(run, text)


def misplaced(text: str) -> str | None:
    """What is wrong with the coordinate tokens that a text spells, or None."""
    for run in _RUN.finditer(text):
        numbers = _LOCATION.findall(run.group())
        outside = [number for number in numbers if len(number) != 4 or int(number) >= NUM_LOC]
        if outside:
            return f"<loc{outside[0]}> is outside the image, which goes from <loc0000> to {LOCATIONS[-1]}"
        for edges in batched(map(int, numbers), 4):
            if len(edges) == 4 and (edges[0] > edges[2] or edges[1] > edges[3]):
                return f"the box {run.group()} is inside out: the order is ymin, xmin, ymax, xmax"
    return None
