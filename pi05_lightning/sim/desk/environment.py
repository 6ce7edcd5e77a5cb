"""The desk as a robot that can be asked for the truth: one scene, many instructions.

As in `sim.metaworld`, a decision lasts `action_repeat` control steps of 1/80 s, and a policy sees images, its
instruction and four values of the arm alone. What stands where depends on the seed and, where it is not said
otherwise, on the task's name, as other numbers would: the instruction cannot be read off the picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.sim.desk.experts import Move
from pi05_lightning.sim.desk.scene import (
    BLOCKS,
    CAMERA,
    HAND_HIGH,
    HAND_LOW,
    OBJECTS,
    Tabletop,
    draw_places,
    named,
    place_words,
)
from pi05_lightning.sim.desk.tasks import (
    CHAIN,
    CHAIN_LENGTH,
    INSTRUCTIONS,
    OPEN,
    PARTNERS,
    SHUT,
    TASKS,
    TURNED,
    Episode,
    Task,
    draw_before,
    draw_chain,
    holds,
)
from pi05_lightning.sim.environment import DemonstratorConfig, NoSuchEnvironment, View, act_as_expert, action_repeat
from pi05_lightning.sim.metaworld.environment import import_metaworld
from pi05_lightning.sim.rendering import GRIPPER, Cameras
from pi05_lightning.sim.sawyer import CONTROL_HZ, Sawyer
from pi05_lightning.sim.splits import CHAINS, OTHERS

if TYPE_CHECKING:
    from pi05_lightning.data.robot import Robot

_NAMES = {sentence: name for name, task in TASKS.items() for sentence in (task.sentence, *task.others)}


@dataclass(frozen=True)
class Desk(DemonstratorConfig):
    """A desk with a drawer, a faucet, three buttons and two blocks: many instructions."""

    same_states: bool = False
    """Whether the n-th initial state is the same for all tasks, so that only the instruction tells them apart."""

    control_hz = CONTROL_HZ
    cameras = (CAMERA, "gripperPOV")
    demonstrated = tuple(TASKS)

    def is_chain(self, task: str) -> bool:
        return task == CHAIN

    def warm_up(self) -> None:
        import_metaworld()

    def tasks(self, robot: Robot) -> list[str]:
        """Those that the policy was trained on, from their instructions; all of one step where it knows none."""
        return list(dict.fromkeys(_NAMES[s] for s in robot.tasks if s in _NAMES)) or list(INSTRUCTIONS)

    def check_task(self, task: str) -> None:
        if task not in TASKS:
            known = f"use one of {', '.join(TASKS)}; in a rollout also {CHAIN}"
            raise NoSuchEnvironment(f"the desk has no task {task!r}{suggestion(task, TASKS)}: {known}")

    def sentences(self, task: str) -> Sequence[str]:
        return () if task == CHAIN else (TASKS[task].sentence, *TASKS[task].others)

    def partners(self, tasks: Sequence[str]) -> dict[str, str]:
        """Of those of one step the one that is half of the list away, as tasks that are alike are neighbours."""
        names = [name for name in (tasks if len(tasks) > 1 else INSTRUCTIONS) if name in INSTRUCTIONS]
        others = {name: names[(place + len(names) // 2) % len(names)] for place, name in enumerate(names)}
        others = PARTNERS | {name: other for name, other in others.items() if name != other}
        return {name: others[name] for name in tasks if name in others}

    def open(self, task: str, view: View) -> DeskEnvironment:
        if task != CHAIN:
            self.check_task(task)
        repeat = action_repeat("the desk", self.control_hz, view)
        kind = ChainEnvironment if task == CHAIN else DeskEnvironment
        return kind(task, view.image_size, view.cameras, repeat, self.same_states)


class DeskEnvironment(Sawyer):
    """The desk at one task.

    Args:
        task: a name of `TASKS`.
        image_size: height and width of the images, in pixels.
        cameras: `desk`, or MetaWorld's (gripperPOV, topview, corner, …).
        steps: control steps that one `step` lasts.
        same_states: whether `reset` puts things in the same places whatever the task.

    Raises NoSuchEnvironment, a ValueError, on an unknown camera. Close it before the interpreter exits.
    """

    objects = tuple(OBJECTS)

    def __init__(
        self,
        task: str,
        image_size: int = 64,
        cameras: Sequence[str] = Desk.cameras,
        steps: int = 8,
        same_states: bool = False,
    ) -> None:
        self.task = task
        self.cameras = tuple(cameras)
        self.action_repeat = steps
        self._key = () if same_states else (zlib.crc32(task.encode()),)
        self._desk = Tabletop()
        things = {**OBJECTS, "gripper": GRIPPER}
        self._views = Cameras("the desk", self._desk.model, image_size, self.cameras, {}, things)
        self._given = TASKS.get(task) or next(iter(INSTRUCTIONS.values()))
        self._other: Task | None = None
        self.solved_other = False

    def reset(self, seed: int) -> None:
        """Put the robot and all things where `seed` says; the same for the same seed, whatever came before."""
        self._desk.reset(draw_places(np.random.default_rng([seed, *self._key])))
        self._given = TASKS.get(self.task, self._given)
        self.episode = Episode.beginning(self._desk.state())
        """What happened since the instruction was given."""
        self._other, self.solved_other = None, False

    def reset_after_others(self, seed: int) -> None:
        """As `reset`, but the experts of one to four other instructions have done theirs since."""
        self.reset(seed)
        rng = np.random.default_rng([seed, *self._key, OTHERS])
        own = self._given
        for name in draw_before(rng, own):
            self._given = INSTRUCTIONS[name]
            self.episode = Episode.beginning(self._desk.state())
            for _ in range(round(self._given.seconds * self.fps)):
                if act_as_expert(self):
                    break
        self._given = own
        self.episode = Episode.beginning(self._desk.state())

    def watch(self, task: str) -> bool:
        """Watch until the next reset whether another task is solved.

        Returns whether that tells anything: it is not solved already, and neither is done by doing the other.
        """
        Desk().check_task(task)
        known = holds(task, self.task) or TASKS[task].solved(self.episode)
        self._other = None if known else TASKS[task]
        return self._other is not None

    def instruct(self, task: str) -> bool:
        """Give another task's instruction until the next reset, and judge what is done from now on."""
        Desk().check_task(task)
        self._given = TASKS[task]
        self.episode = Episode.beginning(self.episode.now)
        return True

    def control_step(self, action: np.ndarray) -> bool:
        self._desk.act(np.clip(action, -1.0, 1.0))
        self.episode = self.episode.after(self._desk.state())
        if self._other is not None and not self.solved_other:
            self.solved_other = self._other.solved(self.episode)
        return self._given.solved(self.episode)

    def expert_action(self) -> np.ndarray:
        return self._move().action(self.episode.now.hand)

    def subtask(self) -> str:
        """What the expert is doing at the moment, in words, and where what it is about stands."""
        words = self._move().words
        return f"{words} {place_words(self.positions()[named(words)])}"

    def _move(self) -> Move:
        return self._given.expert(self.episode)

    @property
    def sentence(self) -> str:
        """The instruction."""
        return self._given.sentence

    @property
    def workspace(self) -> tuple[np.ndarray, np.ndarray]:
        return HAND_LOW, HAND_HIGH

    @property
    def target(self) -> str | None:
        """The thing that the instruction is about, if it is about one."""
        return self._given.target

    @property
    def other_sentences(self) -> tuple[str, ...]:
        """The same in other words."""
        return self._given.others

    @property
    def max_seconds(self) -> float:
        return self._given.seconds

    @property
    def _data(self) -> Any:
        return self._desk.data

    @property
    def _fingertips(self) -> np.ndarray:
        return self._desk.fingertips

    @property
    def state(self) -> np.ndarray:
        return np.array([*self.episode.now.hand, self.episode.now.gripper], np.float32)

    def facts(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """Questions about the state of things, their answers, and what an image has to show."""
        now = self.episode.now
        drawer = "yes" if now.drawer_open > OPEN else "no" if now.drawer_open < SHUT else "half"
        yield "is the drawer open?", drawer, ("drawer", "drawer handle")
        angle = now.faucet_angle
        way = "left" if angle < -TURNED else "right" if angle > TURNED else "ahead"
        yield "where does the faucet point?", way, ("faucet handle",)
        for colour in BLOCKS:
            inside = "yes" if now.in_drawer(colour) else "no"
            yield f"is the {colour} block in the drawer?", inside, (f"{colour} block", "drawer")

    def place_hand(self, position: np.ndarray, effort: float) -> None:
        self._desk.place_hand(position, effort)
        self.episode = self.episode.after(self._desk.state())


class ChainEnvironment(DeskEnvironment):
    """Instructions one after the other without a reset, as CALVIN has them: the first that fails ends the episode.

    done    instructions that were done in a row
    length  all of them
    """

    done, length = 0, CHAIN_LENGTH
    max_seconds = sum(sorted(task.seconds for task in INSTRUCTIONS.values())[-length:])

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._chain = draw_chain(np.random.default_rng([seed, *self._key, CHAINS]), self.length)
        self.done, self.ended = 0, False
        self._give()

    def _give(self) -> None:
        self._given = INSTRUCTIONS[self._chain[self.done]]
        self.episode = Episode.beginning(self.episode.now)
        self._steps_left = round(self._given.seconds * Desk.control_hz)
        self._was_open = not self._given.solved(self.episode)

    def watch(self, task: str) -> bool:
        """Nothing else is judged while instructions change."""
        return False

    def instruct(self, task: str) -> bool:
        """It gives its own instructions."""
        return False

    def control_step(self, action: np.ndarray) -> bool:
        """One control step; returns whether all instructions are done."""
        if self.ended or self.done == self.length:
            return self.done == self.length
        solved = super().control_step(action)
        if solved and self._was_open:  # what held when it was given counts once it is done anew, as in CALVIN
            self.done += 1
            if self.done < self.length:
                self._give()
        else:
            self._was_open = self._was_open or not solved
            self._steps_left -= 1
            self.ended = self.ended or self._steps_left <= 0
        return self.done == self.length
