"""What weights were trained on, and so what a policy that has them can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pi05_lightning.data.processor import Processor
from pi05_lightning.recipe import Recipe, Stage

Actions = Literal["flow", "fast"]
ADVANTAGE = "advantage"
"""Among the terms that were trained: actions were conditioned on the sign of their advantage."""


@dataclass(frozen=True)
class Trained:
    """For how many optimizer steps each stage and each loss term was trained."""

    stages: dict[str, int] = field(default_factory=dict)
    """Stage's name: steps; only those that have some."""
    terms: dict[str, int] = field(default_factory=dict)
    """Loss term's name: steps in which it was trained."""
    complete: bool = False
    """Whether that is all: false for weights that began with others of which nothing is known."""
    delays: dict[int, int] | None = field(default_factory=dict)
    """`rtc_max_delay`, where it is not 0: steps of the flow loss with it. None where that is not known."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trained:
        """The inverse of `asdict`, by way of JSON too, whose keys are text."""
        delays = values.get("delays")  # a record may be older than this
        known = {key: value for key, value in values.items() if key != "delays"}
        return cls(**known, delays=None if delays is None else {int(delay): n for delay, n in delays.items()})

    def able(self, term: str) -> bool:
        """Whether a loss term was trained, or may have been."""
        return not self.complete or self.terms.get(term, 0) > 0

    @property
    def max_delay(self) -> int | None:
        """Actions that the flow head was trained to go on from, at most; None where that is not known."""
        return None if self.delays is None else max(self.delays, default=0)

    def __add__(self, later: Trained) -> Trained:
        """What was trained before, and after it; actions that are then learned without an advantage follow none."""
        unknown = self.delays is None or later.delays is None
        terms = Counter(self.terms) + Counter(later.terms)
        if not later.terms.keys().isdisjoint(get_args(Actions)) and ADVANTAGE not in later.terms:
            del terms[ADVANTAGE]
        return Trained(
            dict(Counter(self.stages) + Counter(later.stages)),
            dict(terms),
            self.complete and later.complete,
            None if unknown else dict(Counter(self.delays) + Counter(later.delays)),
        )


UNKNOWN = Trained(delays=None)
ELSEWHERE = Trained()
"""By openpi or LeRobot: nothing is known, but that they train no flow head to go on from actions."""


def trained(
    recipe: Recipe,
    first: int,
    end: int,
    max_delay: int = 0,
    learned: Callable[[Stage], Collection[str]] = lambda stage: stage.weights,
) -> Trained:
    """What the optimizer steps first .. end - 1 of a recipe train.

    max_delay: `rtc_max_delay` of these steps.  learned: of a stage's loss terms those that change a weight of theirs.
    """
    found = Trained(complete=True)
    for stage, steps in recipe.between(first, end):
        terms = dict.fromkeys(learned(stage), steps)
        delays = {max_delay: steps} if max_delay and "flow" in terms else {}
        found += Trained({stage.name: steps}, terms, complete=True, delays=delays)
    return found


@dataclass(frozen=True)
class Abilities:
    """What a policy can do. Where its training is not known, what it has the parts for counts as able."""

    robots: tuple[str, ...]
    """Names of the robots that it can act as; where there are several, one must be named."""
    stages: dict[str, int]
    """Stage's name: optimizer steps trained; empty where unknown."""
    flow: bool
    """Actions from the flow head."""
    fast: bool
    """Actions from FAST tokens."""
    subtasks: bool
    """It says what to do next, as one of its robots at least, and acts on it."""
    max_delay: int | None = None
    """Actions that the flow head can go on from (real-time chunking), at most; None where that is not known."""
    advantage: bool = False
    """It acts better when it is told to."""

    @classmethod
    def of(cls, processor: Processor, trained: Trained) -> Abilities:
        robots = processor.acting
        return cls(
            robots=robots,
            stages=trained.stages,
            flow=bool(robots) and trained.able("flow"),
            fast=bool(robots) and processor.fast is not None and trained.able("fast"),
            subtasks=any(map(processor.predicts_subtasks, robots)) and trained.able("subtask"),
            max_delay=trained.max_delay,
            advantage=trained.terms.get(ADVANTAGE, 0) > 0,
        )

    def check_actions(self, actions: Actions) -> None:
        """ValueError, which says what the policy can do, for a kind of actions that it was not trained on."""
        able = {"flow": self.flow, "fast": self.fast}
        if able[actions]:
            return
        stages = ", ".join(f"{name} ({steps} steps)" for name, steps in self.stages.items()) or "not recorded"
        others = [f"`actions: {name}`" for name, is_able in able.items() if is_able]
        raise ValueError(
            f"`actions: {actions}`: the policy was not trained on that; its training was {stages}. It can act with"
            f" {others[0]}"
            if others
            else f"`actions: {actions}`: the policy was not trained on actions of any kind; its training was {stages}"
        )

    def check_delay(self, delay: int, name: str) -> None:
        """ValueError for more given actions than the flow head was trained to go on from. name: the option's."""
        if self.max_delay is not None and delay > self.max_delay:
            raise ValueError(
                f"{name} of {delay} actions: the flow head was trained to go on from {self.max_delay} at most"
                " (model.rtc_max_delay); leave them out, or with inference_delay set rtc to false"
            )
