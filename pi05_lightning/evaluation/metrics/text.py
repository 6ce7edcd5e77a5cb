"""Metrics of what is said: boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision import ops

from pi05_lightning.types import Box


def box_iou(said: Sequence[Box], truth: Sequence[Box]) -> float:
    """Mean over the true boxes of the IoU with the box said in the same place; 0 for one that was not said.

    A box whose corners are the wrong way round, which a model may say, overlaps nothing.
    """
    pairs = min(len(said), len(truth))
    a, b = (torch.tensor(boxes[:pairs], dtype=torch.float64).reshape(-1, 4) for boxes in (said, truth))
    iou = ops.box_iou(a, b).diagonal()
    alike = (a == b).all(1).to(iou)  # two boxes without an area have no IoU
    return float(torch.where(iou.isnan(), alike, iou).sum()) / len(truth)
