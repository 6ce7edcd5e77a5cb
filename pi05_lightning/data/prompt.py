"""Frames to token segments: the prompt, and what the model is to say. Every template is configuration.

No public template for subtasks exists; the flow and FAST ones are openpi's and LeRobot's.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Literal

import numpy as np

from pi05_lightning.types import Answer, Frame, Segment, Target

ConditionOn = Literal["subtask", "task", "both"]

STATE_BINS = np.linspace(-1, 1, 257)[:-1]


def discretize_state(state: np.ndarray, *, clip: bool) -> np.ndarray:
    """Normalised state f32[S] to bins i64[S] in 0..255 (-1..255 when not clipped, as in openpi and LeRobot)."""
    bins = np.digitize(state, STATE_BINS) - 1
    return bins.clip(0, 255) if clip else bins


def clean_task(task: str) -> str:
    """One line without underscores, as openpi and LeRobot do."""
    return task.strip().replace("_", " ").replace("\n", " ")


def fields_of(template: str) -> set[str]:
    """What a template asks for. Raises ValueError for a brace that is not closed."""
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


@dataclass(frozen=True)
class Prompts:
    """Templates. What is filled in: `{task}`, `{state}`, `{subtask}`, `{question}`, `{embodiment}`, `{control_mode}`,
    `{advantage}`.

    Raises ValueError for a template that asks for anything else.
    """

    action: str = "Task: {task}, State: {state};\nAction: "
    """Low level, conditioned on the task."""
    action_subtask: str = "Subtask: {subtask}, State: {state};\nAction: "
    """Low level, conditioned on the subtask alone."""
    task: str = "Task: {task}, State: {state};\n"
    """High level, and the prompt that FAST tokens or a subtask follow."""
    fast_subtask: str = "Subtask: {subtask}, State: {state};\n"
    """The prompt that FAST tokens follow when they are conditioned on the subtask alone."""
    subtask: str = "Subtask: {subtask}"
    """What the high level says."""
    advantage: str = "Advantage: {advantage};\n"
    """How good the actions are that follow, after all that they are conditioned on (π*0.6)."""
    question: str = "{question}\n"
    fast_opening: str = "Action: "
    fast_closing: str = "|"
    clip_state: bool = True
    """False reproduces openpi's and LeRobot's bin -1 for values below the first quantile."""

    def __post_init__(self) -> None:
        robot = {"task", "state", "embodiment", "control_mode"}
        allowed = {
            "action": robot,
            "action_subtask": robot | {"subtask"},
            "task": robot,
            "fast_subtask": robot | {"subtask"},
            "subtask": {"subtask"},
            "advantage": {"advantage"},
            "question": {"question"},
        }
        for name, names in allowed.items():
            template = getattr(self, name)
            if not template.strip():
                raise ValueError(f"prompts.{name} is {template!r}: write a template, of {sorted(names)}")
            if unknown := fields_of(template) - names:
                raise ValueError(f"prompts.{name} is {template!r}, and {sorted(unknown)} is none of {sorted(names)}")

    def said(self, text: str) -> str:
        """The subtask in what the model said; what may come before the template's words are boxes."""
        before, _, after = (part.strip() for part in self.subtask.partition("{subtask}"))
        return (text.rpartition(before)[2] if before else text).strip().removesuffix(after).strip()

    def state(self, frame: Frame) -> str:
        bins = () if frame.state is None else discretize_state(frame.state, clip=self.clip_state)
        return " ".join(map(str, bins))

    def fill(self, template: str, frame: Frame, subtask: str | None = None) -> Segment:
        values = {"task": clean_task(frame.task), "state": self.state(frame), "subtask": subtask}
        return Segment(template.format(**vars(frame) | values))

    def high_level(self, frame: Frame) -> list[Segment]:
        """What the subtask is asked with."""
        return [self.fill(self.task, frame)]

    def say_subtask(self, subtask: str, is_target: bool = True) -> Segment:
        return Segment(self.subtask.format(subtask=subtask), loss=Target.SUBTASK if is_target else Target.SAID)

    def low_level(
        self,
        frame: Frame,
        subtask: str | None,
        condition_on: ConditionOn,
        *,
        fast: bool,
        advantage: str | None = None,
    ) -> list[Segment]:
        """What actions are conditioned on; without a subtask, the task alone; last the advantage, if any is said.

        fast: FAST tokens come next, and they open with "Action: " themselves.
        """
        segments = self._conditions(frame, subtask, condition_on, fast=fast)
        if advantage is None:
            return segments
        told, last = Segment(self.advantage.format(advantage=advantage)), segments[-1]
        opening = self.fast_opening
        if last.loss or not opening or not (last.text or "").endswith(opening):
            return [*segments, told]
        return [*segments[:-1], Segment((last.text or "").removesuffix(opening)), told, Segment(opening)]

    def _conditions(self, frame: Frame, subtask: str | None, condition_on: ConditionOn, *, fast: bool) -> list[Segment]:
        if subtask is None or condition_on == "task":
            return [self.fill(self.task if fast else self.action, frame)]
        if condition_on == "subtask":
            return [self.fill(self.fast_subtask if fast else self.action_subtask, frame, subtask)]
        return [*self.high_level(frame), self.say_subtask(subtask, frame.subtask_is_target)]

    def ask(self, answer: Answer) -> list[Segment]:
        """A question and its answer as target."""
        return [Segment(self.question.format(question=answer.question)), Segment(answer.answer, loss=Target.TEXT)]
