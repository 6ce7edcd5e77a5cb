"""Metrics of what is said: boxes."""

from __future__ import annotations

from collections.abc import Sequence

from pi05_lightning.types import Box


def box_iou(said: Sequence[Box], truth: Sequence[Box]) -> float:
    """Mean over the true boxes of the IoU with the box said in the same place; 0 for one that was not said."""
    total = 0.0
    for a, b in zip(said, truth, strict=False):
        height = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        width = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = _area(a) + _area(b) - height * width
        total += height * width / union if union > 0 else float(a == b)
    return total / len(truth)


def _area(box: Box) -> float:
    # a box whose corners are the wrong way round, which a model may say, is empty
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
