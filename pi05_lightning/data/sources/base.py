"""What a source of data is: a map from index to Frame, opened from a configuration that YAML can hold."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np

from pi05_lightning.data.errors import OnBadSample, Rejects
from pi05_lightning.data.looks import Look
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.split import Split
from pi05_lightning.types import Frame, Modality, Shapes


@dataclass(frozen=True)
class Sizes:
    """How much there is to attend to in each of N frames, i64[N] or one number for all; near enough to sort by."""

    images: np.ndarray | int = 0
    task: np.ndarray | int = 0
    """Characters of its instruction."""
    subtask: np.ndarray | int = 0
    """Characters of its subtask."""
    answers: np.ndarray | int = 0
    """Characters of its questions and answers."""
    taught: np.ndarray | bool = True
    """Whether its subtask, where it has one, is to be learned, and not only what a policy said."""


class Source(ABC):
    """Frames by index. A subclass says how many there are, what one holds, and what they can teach."""

    name: str = ""
    modalities: ClassVar[tuple[Modality, ...]] = ()
    """What every frame can serve as."""
    on_bad_sample: OnBadSample = "error"
    """What becomes of a frame that turns out bad only when it is read."""
    tells_advantage: bool = False
    """Whether every frame says if what is done in it is better than was to be expected."""
    tells_return: bool = False
    """Whether every frame says how its episode will end, which a value learns."""
    same_robot_as: str | None = None
    """The source whose robot its own is."""
    hub_id: str | None = None
    """The Hub's name of its data, where it was opened from there."""
    rejects: Rejects | None = None
    """What was found bad, and left out, when it was opened."""

    @property
    def camera_names(self) -> Sequence[str]:
        """The cameras that its frames may have."""
        return ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Frame:
        """Raises BadSample, with the frame's address, for data that must not be trained on."""

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: the frames that can serve as this modality; by default all, for those in `modalities`."""
        return np.arange(len(self) if modality in self.modalities else 0)

    def sizes(self, modality: Modality) -> Sizes:
        """Of the frames in `indices(modality)`: batches of similar length are made of it, so it may be left out.

        Where it is not, it has to be right about which frames have an image, or a subtask that is taught, see
        `Samples.alike`.
        """
        return Sizes(images=len(self.camera_names))

    def address(self, index: int) -> str:
        """Dataset, episode and frame, for messages."""
        return f"dataset {self.name!r}, item {index}"

    def place(self, index: int) -> dict[str, int | float]:
        """Where a frame is, as columns of a table."""
        return {"item": index}

    def names(self, part: Literal["state", "action"]) -> dict[str, list[str] | None]:
        """Features that are concatenated into the state or the action, each with its dims' names, None for unknown."""
        return {}

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to do
        """Once, in the main process, before training: caches and the like."""

    def leave_out_unexplained(self, robot: Robot | None) -> bool:
        """Before it is drawn from: leave out what statistics of the robot that normalises its frames do not explain.

        Whether it left out anything.  Raises BadSample unless that is to be skipped.
        """
        return False

    def robot(self) -> Robot | None:
        """What a policy must know of the robot in the data; None for data without one."""
        return None

    def looks(self) -> dict[str, Look]:
        """How the images of its cameras look, as far as it can tell."""
        return {}

    def checked_robot(self) -> Robot | None:
        """`robot`, after what its statistics do not explain was left out: they are of what is left."""
        robot = self.robot()
        while self.leave_out_unexplained(robot):
            robot = self.robot()
        return robot


class SourceConfig(ABC):
    """A source as configured."""

    splits: ClassVar[tuple[Split, ...]] = ("train", "val")
    """The parts that it may have. One with "test" may still be opened without a frame in it."""

    @abstractmethod
    def open(self, name: str, split: Split, shapes: Shapes) -> Source:
        """One of the source's parts, made to the model's shapes."""


class SimpleSource(Source, SourceConfig):
    """A source that is its own configuration: the arguments of its `__init__` are the keys in YAML.

    Once open it knows its `name`, its `split` and the model's `shapes`.
    """

    split: Split
    shapes: Shapes

    def open(self, name: str, split: Split, shapes: Shapes) -> Self:
        """A copy that belongs to this split."""
        opened = copy.copy(self)
        opened.name, opened.split, opened.shapes = name, split, shapes
        return opened
