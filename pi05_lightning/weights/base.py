"""What every kind of weights on disk can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pi05_lightning.data.processor import Processor
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import Abilities, Trained
from pi05_lightning.weights.safetensors import ContentHash, Keep, build, check_keys, keep_all, shapes_of
from pi05_lightning.weights.shards import MappedReader


class Weights(ABC):
    """Weights at a path, read as far as they are asked for. Every question raises ValueError for what is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def config(self) -> ModelConfig:
        """The model's dimensions."""

    @abstractmethod
    def tensors(self, dtype: torch.dtype | None = None, keep: Keep = keep_all) -> dict[str, Tensor]:
        """The model's tensors under our names, of a model without adapters.

        They are in memory of their own: a policy keeps its weights, whatever becomes of the file. With a dtype, each is
        cast to it on the way.  `build` and `fill` check that they are a model's, all of them and no others.
        keep: which part of each is returned, such as a rank's slice, so that all of them need not fit into memory.
        """

    def mapped_tensors(self) -> dict[str, Tensor]:
        """As `tensors`, where possible mapped from the files, so that a slice is all that is read of one."""
        return self.tensors()

    def content_hash(self) -> str:
        """SHA-256 of all tensors under our names: the same in one file or several, in LeRobot's folder or in ours.

        Each is read once, and none is kept.
        """
        content = ContentHash()
        self.tensors(keep=content.add)
        return content.hexdigest()

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read the tensors into those of the same names; of a DTensor this rank's slice is all that is read.

        ValueError that lists every missing, unexpected and misshaped key.
        """
        tensors = self.mapped_tensors()
        check_keys(shapes_of(tensors), shapes_of(targets), where=self.path)
        MappedReader(tensors).fill(targets)

    @abstractmethod
    def processor(self) -> Processor:
        """What stands between the model and a robot."""

    @property
    def notes(self) -> list[str]:
        """What is to be said of the tensors, once they were read."""
        return []

    @property
    @abstractmethod
    def trained(self) -> Trained:
        """What the weights were trained on, as far as it is known."""

    @property
    def abilities(self) -> Abilities:
        """What a policy with these weights can do."""
        return Abilities.of(self.processor(), self.trained)

    def model(self, dtype: torch.dtype | None = None) -> Pi05:
        """The model itself; dtype as for `tensors`. ValueError when dimensions and tensors do not fit."""
        return build(self.config(), self.tensors(dtype))
