"""Metrics of predicted text: its boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision import ops

from pi05_lightning.types import Box


def box_iou(predicted: Sequence[Box], truth: Sequence[Box]) -> float:
    """Mean over the true boxes of the IoU with the predicted box in the same place; 0 where there is none.

    A box whose corners are the wrong way round, which a model may predict, overlaps nothing.
    """
    pairs = min(len(predicted), len(truth))
    a, b = (torch.tensor(boxes[:pairs], dtype=torch.float64).reshape(-1, 4) for boxes in (predicted, truth))
    iou = ops.box_iou(a, b).diagonal()
    alike = (a == b).all(1).to(iou)  # two boxes without an area have no IoU
    return float(torch.where(iou.isnan(), alike, iou).sum()) / len(truth)
