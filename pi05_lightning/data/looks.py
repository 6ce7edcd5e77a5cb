"""How a camera's images look on average: enough to tell one that is turned, mirrored, or has its colours swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 8
LEAST_CONTRAST = 2.0  # grey levels; a flatter mean tells nothing
SAME_SCENE = 0.4
"""Likeness from which on two means show the same scene."""
MOST_CHANCE_GAIN, CLEAR_GAIN = 0.1, 0.25
"""Likeness that a change of the image adds: up to the first by chance; from the second on the image was so changed."""
MOST_LACK, MOST_LEFT = 0.02, 0.25
"""Of what lacks to a likeness of 1: up to the first nothing was changed. Where a change leaves less than the second
share of it, the image was so changed, however small the gain."""

_TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda mean: mean,
    "upside down": lambda mean: mean[:, ::-1],
    "mirrored": lambda mean: mean[:, :, ::-1],
    "turned by 180°": lambda mean: mean[:, ::-1, ::-1],
    "turned by 90° to the left": lambda mean: np.rot90(mean, 1, (1, 2)),
    "turned by 90° to the right": lambda mean: np.rot90(mean, -1, (1, 2)),
}


@dataclass(frozen=True)
class Look:
    """The mean of a camera's images, u8[3 SIDE SIDE], and their height and width in pixels.

    varied: what some of these images themselves look like beside the mean, as "mirrored" where a scene comes both ways.
    """

    mean: np.ndarray
    size: tuple[int, int]
    varied: tuple[str, ...] = ()

    @classmethod
    def of(cls, images: Iterable[np.ndarray]) -> Look | None:
        """Of images [3 h w] of 0..255; None of none."""
        means, size = [], (0, 0)
        for image in images:
            size = int(image.shape[1]), int(image.shape[2])
            means.append(F.adaptive_avg_pool2d(torch.as_tensor(np.ascontiguousarray(image)).float(), SIDE))
        if not means:
            return None
        look = cls(torch.stack(means).mean(0).round().byte().numpy(), size)
        liker = {best for one in means for best, gain, _ in [look._compared(one.numpy())] if gain > MOST_CHANCE_GAIN}
        return replace(look, varied=tuple(sorted(liker)))

    def to_dict(self) -> dict[str, Any]:
        """Plain types that a checkpoint can carry."""
        return {"mean": self.mean.tolist(), "size": list(self.size), "varied": list(self.varied)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Look:
        """The inverse of `to_dict`."""
        return cls(np.array(values["mean"], np.uint8), tuple(values["size"]), tuple(values.get("varied", ())))

    def distance(self, other: Look) -> float:
        """Root mean square of the difference of both means, in grey levels."""
        return float(np.sqrt(np.mean((self.mean.astype(float) - other.mean) ** 2)))

    def shown_as(self, other: Look) -> str | None:
        """What was done to images of this look to have them look as another's do: "", "upside down", "mirrored, …".

        None where nothing tells, as the two show other scenes, or hardly anything, or as some of its own images look
        like that.
        """
        if min(self.mean.std(), other.mean.std()) < LEAST_CONTRAST:
            return None
        best, gain, straight = self._compared(other.mean)
        lacked = 1 - straight
        if gain >= CLEAR_GAIN or (lacked > MOST_LACK and lacked - gain < MOST_LEFT * lacked):
            return best if straight + gain >= SAME_SCENE and best not in self.varied else None
        return "" if straight >= SAME_SCENE and gain <= MOST_CHANCE_GAIN else None

    def _compared(self, mean: np.ndarray) -> tuple[str, float, float]:
        """The change that makes this look likest to a mean, by how much more than none, and how like it is without."""
        ours = self.mean.astype(float)
        scores = {
            ", ".join(filter(None, (turn, colour))): _likeness(change(ours[order]), mean.astype(float))
            for turn, change in _TURNS.items()
            for colour, order in {"": [0, 1, 2], "red and blue swapped": [2, 1, 0]}.items()
        }
        best = max(scores, key=lambda change: scores[change])
        return best, scores[best] - scores[""], scores[""]


def _likeness(mean: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two means [3 SIDE SIDE], up to 1: half of it with, half without what each channel is as a whole.

    The former sees colours, the latter how the scene lies in the picture.
    """
    centred = (x - x.mean((1, 2), keepdims=True) for x in (mean, other))
    return float(np.mean([_correlation(mean, other), _correlation(*centred)]))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if min(a.std(), b.std()) > 0 else 0.0
