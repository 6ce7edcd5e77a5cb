"""Boxes as datasets write them, as numbers or in text, to PaliGemma's coordinate tokens.

`<locYYYY>` four times is ymin, xmin, ymax, xmax in 1024 steps over the image; twice, a point's y and x.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torchvision.ops import box_convert

from pi05_lightning.types import Box, box_to_text, edges_to_text

BoxOrder = Literal["xyxy", "yxyx", "xywh", "cxcywh"]
"""Corners (x or y first), the top left corner with width and height, or the centre with them."""
NOTHING = "none"  # the answer where nothing was detected: an empty one would look like a mistake


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
    Raises ValueError for coordinates outside the image, in another format, or malformed.
    """
    if not answer.lstrip().startswith("{"):
        return answer
    try:
        found: dict[str, Any] = json.loads(answer)
    except json.JSONDecodeError:
        return answer
    try:
        return _spelled(found, height, width) or answer
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"it is malformed: LeRobot's annotator writes no such detections or point: {answer}"
        ) from error


def _spelled(found: dict[str, Any], height: float, width: float) -> str | None:
    """`from_lerobot` of what is in the JSON; None for what is neither detections nor a point."""
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
    return None
