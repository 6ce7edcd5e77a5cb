"""Trials: what is planned of an episode, and what came of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pi05_lightning.files.ranges import check_range
from pi05_lightning.sim.instructions import Instruction
from pi05_lightning.sim.modes import Mode
from pi05_lightning.types import Frame

OUT_OF_TIME = "out of time"
SOLVED_OTHER = "it solved the task that it was told"
ENDED = "the environment ended the episode"
NOT_FINITE = "the policy's action is not finite"


@dataclass(frozen=True)
class Trial:
    """An episode as it is planned: all that decides how it goes, beside the policy and what it is told."""

    mode: Mode
    task: str
    seed: int
    """Of the initial state."""
    films: Literal["none", "failure", "all"] = "none"
    """What is filmed: all, action by action; or a failure, decision by decision, of what the policy sees anyhow."""
    max_seconds: float | None = None
    """Simulated time after which it has failed; None: what the environment says."""
    noise_seed: int = 0
    """Of the policy's noise, of delays and of random actions."""
    delays: tuple[int, ...] = ()
    """Actions that are executed while a chunk is computed: one is drawn for each chunk. Empty: `inference_delay`."""
    number: int = 0
    """Of the episode among those of its task and mode."""
    instruction: Instruction = "right"
    other: str | None = None
    """Of `swapped`: the task whose instruction is given."""
    keeps: bool = False
    """Whether the result has its steps."""
    patience: int | None = None
    """Actions without progress after which the expert takes over, until the end; None: it never does.

    Progress is that the expert would now do something else, in words: see `Demonstrator.subtask`."""

    def __post_init__(self) -> None:
        check_range("max_seconds", self.max_seconds, 0, above=True)

    @property
    def draws(self) -> list[int]:
        """What its noise, tokens, delays and random actions are drawn with: another task draws others."""
        return [self.noise_seed, zlib.crc32(self.task.encode()), self.seed]

    @property
    def column(self) -> str:
        """Of the tables: the mode, and the kind of instruction where that is not the right one."""
        return self.mode if self.instruction == "right" else f"{self.mode}, {self.instruction}"

    @property
    def title(self) -> str:
        return f"{self.column} · {self.task}"


@dataclass(frozen=True)
class FilmFrame:
    """What a film shows of one action: u8[h w 3], all cameras side by side; the chunk f32[T A] that it is from."""

    image: np.ndarray
    caption: str
    chunk: np.ndarray | None = None
    place: int = 0
    """Of the action in the chunk."""


@dataclass(frozen=True)
class Step:
    """What was seen before an action, and what was done: f32[A] in the robot's units.

    subtask: what the policy said, or the expert is doing.  is_correction: whether the expert did it.
    """

    frame: Frame
    action: np.ndarray
    subtask: str | None
    is_correction: bool = False


@dataclass
class Result:
    """How a trial goes, and how it ended."""

    trial: Trial
    success: bool = False
    reason: str = ""
    """Why it ended without success; empty while it runs, and after success."""
    lacked_memory: bool = False
    """Whether it ended as the machine, or its accelerator, has no memory left or failed."""
    decisions: int = 0
    """Actions taken."""
    subtask: str | None = None
    """What the policy said last."""
    fps: float = 0.0
    """Actions per second."""
    max_seconds: float = 0.0
    """The time that it has, of whole actions."""
    solved_other: bool | None = None
    """Of `swapped`: whether the other task was solved; None where the scene does not allow that."""
    done: int | None = None
    """Of a chain: instructions that were done in a row."""
    length: int = 1
    """Instructions of the episode."""
    corrected: bool = False
    """Whether the expert has taken over."""
    seams: list[float] = field(default_factory=list)
    """Jumps from an action to the next one where that is of another chunk, see `motion.jumps`."""
    inside: list[float] = field(default_factory=list)
    """The same within what a chunk adds to the one before, executed or not."""
    film: list[FilmFrame] = field(default_factory=list)
    film_every: int = 1
    """Actions from one frame of the film to the next."""
    steps: list[Step] = field(default_factory=list)

    @property
    def crashed(self) -> bool:
        """Whether it ended by a fault of the policy or the simulator, of which `reason` tells."""
        return self.reason not in ("", OUT_OF_TIME, ENDED, SOLVED_OTHER)

    @property
    def over(self) -> bool:
        return self.success or bool(self.reason)

    @property
    def outcome(self) -> str:
        return "success" if self.success else self.reason


@dataclass
class Clock:
    """Seconds that each call of the policy, each step of an environment, and all in all took."""

    decisions: list[float] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    """Episodes that a call of the policy served."""
    steps: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Clock) -> None:
        self.decisions += other.decisions
        self.lanes += other.lanes
        self.steps += other.steps
        self.seconds += other.seconds
