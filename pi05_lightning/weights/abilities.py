"""What weights were trained on, and so what a policy that has them can do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pi05_lightning.data.processor import Processor
from pi05_lightning.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """For how many optimizer steps each stage and each loss term was trained; by default nothing is known."""

    stages: dict[str, int] = field(default_factory=dict)
    """Stage's name: steps; only those that have some."""
    terms: dict[str, int] = field(default_factory=dict)
    """Loss term's name: steps in which it counted."""
    complete: bool = False
    """Whether that is all: false for weights that began with others of which nothing is known."""

    def able(self, term: str) -> bool:
        """Whether a loss term was trained, or may have been."""
        return not self.complete or self.terms.get(term, 0) > 0

    def __add__(self, later: Trained) -> Trained:
        """What was trained before, and after it."""
        return Trained(
            dict(Counter(self.stages) + Counter(later.stages)),
            dict(Counter(self.terms) + Counter(later.terms)),
            self.complete and later.complete,
        )


UNKNOWN = Trained()


def trained(recipe: Recipe, first: int, end: int) -> Trained:
    """What the optimizer steps first .. end - 1 of a recipe train."""
    stages: dict[str, int] = {}
    terms: Counter[str] = Counter()
    for stage in recipe.reached:
        begin = recipe.first_step(stage)
        # steps beyond the recipe's last are the last stage's
        stop = end if stage is recipe.reached[-1] else begin + stage.steps
        steps = min(end, stop) - max(first, begin)
        if steps > 0:
            stages[stage.name] = steps
            terms.update(dict.fromkeys(stage.weights, steps))
    return Trained(stages, dict(terms), complete=True)


@dataclass(frozen=True)
class Abilities:
    """What a policy can do. Where its training is not known, what it has the parts for counts as able."""

    robots: tuple[str, ...]
    """Names of the robots that it can act as; the first is what it acts as."""
    stages: dict[str, int]
    """Stage's name: optimizer steps trained; empty where unknown."""
    flow: bool
    """Actions from the flow head."""
    fast: bool
    """Actions from FAST tokens."""
    subtasks: bool
    """It says what to do next."""

    @classmethod
    def of(cls, processor: Processor, trained: Trained) -> Abilities:
        robots = processor.acting
        return cls(
            robots=robots,
            stages=trained.stages,
            flow=bool(robots) and trained.able("flow"),
            fast=bool(robots) and processor.fast is not None and trained.able("fast"),
            subtasks=bool(robots) and processor.predicts_subtasks(robots[0]) and trained.able("subtask"),
        )
