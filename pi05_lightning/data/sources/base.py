"""What a source of data is: a map from index to Frame, opened from a configuration that YAML can hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pi05_lightning.data.processor import Robot
from pi05_lightning.types import Frame, Modality, Shapes

Split = Literal["train", "val"]


class Source(Protocol):
    """Frames by index."""

    @property
    def camera_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frame: ...

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: the frames that can serve as this modality."""
        ...

    def address(self, index: int) -> str:
        """Dataset, episode and frame, for messages."""
        ...

    def prepare(self) -> None:
        """Once, in the main process, before training: caches and the like."""
        ...


@dataclass(frozen=True)
class SourceConfig(ABC):
    """A source as configured; a new kind of data is one such class and a Source."""

    @abstractmethod
    def open(self, name: str, split: Split, shapes: Shapes) -> Source:
        """The source's training or validation part, made to the model's shapes."""

    def robot(self) -> Robot | None:
        """What a policy must know of the robot in the data; None for data without one."""
        return None
