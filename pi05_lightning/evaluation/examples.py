"""Single validation samples, with what the model made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pi05_lightning.types import Subset


@dataclass(frozen=True)
class Example:
    """A validation sample and what the model made of it; what its modality has not got is empty.

    key: its number within its subset.  error: higher is worse, comparable within a subset.
    images: {camera: u8[h w 3]}, the cameras' pictures at the model's resolution, without its padding; places in texts
    are shares of them.  actions: f32[T A] in real units, without padded steps;  draws: f32[K T A], what the model would
    do from K different noises.
    """

    subset: Subset
    key: int
    error: float
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    prompt: str = ""
    predicted: str = ""
    truth: str = ""
    actions: np.ndarray | None = None
    draws: np.ndarray | None = None
