"""How answers fare by what was asked: a mean over all questions hides that a model takes one object for another."""

from __future__ import annotations

import re

import numpy as np
import torch

from pi05_lightning.evaluation.metrics.measure import Measured
from pi05_lightning.ranks import of_all_ranks

MOST = 40  # questions with a row of their own: those asked most, and more than once
OTHERS = "other questions"

Table = dict[str, dict[str, float]]
"""question -> metric -> value"""


class Questions:
    """Sums of one subset by question, as it is asked; places in it are all alike."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        """f64[5]: samples; answers in words, the right ones of them; answers with boxes, their IoU."""

    def update(self, measured: Measured) -> None:
        right, boxes = measured.values["exact_match"], measured.values["box_iou"]
        sums = [
            torch.ones_like(boxes.mask),
            right.mask,
            right.mask * right.values,
            boxes.mask,
            boxes.mask * boxes.values,
        ]
        for question, *row in zip(measured.questions, *(column.tolist() for column in sums), strict=True):
            name = re.sub(r"<loc\d+>", "<loc>", question)
            self._sums[name] = self._sums.get(name, 0) + np.array(row, dtype=np.float64)

    def table(self) -> Table:
        """Samples, exact_match and box_iou by question, the most asked first; collective."""
        sums = dict[str, np.ndarray]()
        for question, row in (item for found in of_all_ranks(self._sums) for item in found.items()):
            sums[question] = sums.get(question, 0) + row
        asked = sorted(sums, key=lambda question: (-sums[question][0], question))
        rows = {question: _means(sums[question]) for question in asked[:MOST] if sums[question][0] > 1}
        if rows and len(rows) < len(asked):
            rows[OTHERS] = _means(np.sum([sums[question] for question in asked if question not in rows], axis=0))
        return rows


def _means(row: np.ndarray) -> dict[str, float]:
    samples, words, right, boxed, iou = row.tolist()
    values: dict[str, float] = {"samples": int(samples)}
    return values | ({"exact_match": right / words} if words else {}) | ({"box_iou": iou / boxed} if boxed else {})
