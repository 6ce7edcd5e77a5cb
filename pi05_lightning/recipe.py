"""The recipe: stages in a list; what counts, from which data, at which rate, as pure functions of the step.

π0.5's own two (arXiv 2504.16054, §IV-D and eq. 1) are what the default words make:

    pretrain    L = CE(text) + CE(subtask) + CE(FAST)       text: captions, answers, boxes
    posttrain   L = CE(subtask) + flow_alpha · flow MSE
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from pi05_lightning.files.ranges import check_expressions, check_range
from pi05_lightning.files.suggestion import suggestion

FLOW_ALPHA = 10.0  # π0.5 §IV-D


@dataclass(frozen=True)
class LossWeights:
    """Weight of every loss term; with 0 it is not trained, and a head whose terms all have 0 does not run."""

    text: float = 0.0
    """Captions, answers, boxes."""
    subtask: float = 0.0
    fast: float = 0.0
    location: float = 0.0
    """Pointing: L1 distance, as a share of the image, between the keypoint that a box's question selects and the box's
    centre. Of the keypoint stem only, and not in π0.5: beside the boxes' cross-entropy, it is how a small model learns
    where things are."""
    flow: float = 0.0
    """Flow matching; multiplied by the stage's flow_alpha."""
    others: dict[str, float] = field(default_factory=dict)
    """Weights of the terms that `model.heads` add, by name."""

    def __post_init__(self) -> None:
        for name, weight in self.used.items():
            check_range(f"loss weight {name}", weight, 0)

    @property
    def used(self) -> dict[str, float]:
        """The weights that are not 0, by the name of the term."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}
        return {name: weight for name, weight in (own | self.others).items() if weight}


@dataclass(frozen=True)
class StageOptions:
    """What a stage trains, on which data and at which rates."""

    losses: LossWeights = field(default_factory=LossWeights)
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each `source/modality` in the draws; empty: equally all in which each sample trains a loss."""
    mixture_temperature: float = 0.0
    """Shares are multiplied by (number of samples) ** this: 0 takes them as they are, 1 draws by size."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; parameters whose name matches one are not trained in this stage."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Regular expression -> factor on the learning rate; the first that matches a parameter's name counts."""
    warmup_steps: int = 0
    final_lr_factor: float = 0.1
    """Cosine decay comes to this share of the learning rate where the stage ends, after its last step."""

    def __post_init__(self) -> None:
        for name, share in self.mixture.items():
            check_range(f"mixture: the share of {name}", share, 0)
        if self.mixture and not any(self.mixture.values()):
            raise ValueError(f"mixture: no share is above 0; got {dict(self.mixture)}")
        check_range("mixture_temperature", self.mixture_temperature, 0, 1)
        check_range("warmup_steps", self.warmup_steps, 0)
        check_range("final_lr_factor", self.final_lr_factor, 0, 1)
        for pattern, factor in self.lr_factors.items():
            check_range(f"lr_factors {pattern}", factor, 0)
        check_expressions("freeze or lr_factors", (*self.freeze, *self.lr_factors))

    @property
    def weights(self) -> dict[str, float]:
        """Weights that are not 0, by the name of the term."""
        return self.losses.used

    def lr_factor(self, name: str) -> float:
        """Factor on a parameter's learning rate: 0 for frozen ones."""
        if any(re.search(pattern, name) for pattern in self.freeze):
            return 0.0
        return next((f for pattern, f in self.lr_factors.items() if re.search(pattern, name)), 1.0)

    def freezes(self, name: str) -> bool:
        """Whether a parameter is frozen in this stage: by `freeze`, or by a factor of 0."""
        return self.lr_factor(name) == 0


@dataclass(frozen=True, kw_only=True)
class Stage(StageOptions):
    """One stage of training."""

    name: str
    """What curves, tables and messages call it."""
    steps: int
    """Optimizer steps; 0 leaves the stage out."""
    flow_alpha: float = FLOW_ALPHA
    """Factor on the weight of the flow loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"a stage's name is {self.name!r}: use letters, digits, _, - and . for it")
        if self.name == "total":
            raise ValueError("a stage's name is 'total', as curves call the loss of all terms: choose another")
        if self.steps < 0:
            raise ValueError(f"stage {self.name} has {self.steps} steps: 0 leaves it out, fewer cannot be")
        check_range(f"{self.name}: flow_alpha", self.flow_alpha, 0)

    @property
    def weights(self) -> dict[str, float]:
        """As of its options, flow_alpha applied."""
        factors = {"flow": self.flow_alpha}
        return {name: weight * factor for name, weight in super().weights.items() if (factor := factors.get(name, 1.0))}


PRETRAIN = StageOptions(losses=LossWeights(text=1.0, subtask=1.0, fast=1.0))
POSTTRAIN = StageOptions(losses=LossWeights(subtask=1.0, flow=1.0))


@dataclass(frozen=True)
class Recipe:
    """Stages, one after the other; steps are optimizer steps, counted from the beginning of the run."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {', '.join(twice)}: give each a name of its own")
        if not self.total_steps:
            raise ValueError(f"the stages {', '.join(names) or '(none)'} have no steps")

    @classmethod
    def of(
        cls,
        pretrain_steps: int = 280_000,
        posttrain_steps: int = 80_000,
        flow_alpha: float = FLOW_ALPHA,
        pretrain: StageOptions = PRETRAIN,
        posttrain: StageOptions = POSTTRAIN,
        then: Sequence[Stage] = (),
    ) -> Recipe:
        """π0.5's two stages, and what comes after them. In the first, a flow loss counts with its weight alone.

        Args:
            pretrain_steps: optimizer steps of stage 1, CE(text) + CE(subtask) + CE(FAST).
            posttrain_steps: optimizer steps of stage 2, CE(subtask) + flow_alpha · flow matching.
            flow_alpha: factor on the weight of the flow loss in stage 2.
            pretrain: loss weights, mixture, learning rates and frozen parts of stage 1.
            posttrain: the same of stage 2.
            then: further stages, in order, each with a `name` and `steps` beside what the first two have.
        """
        first = Stage(**vars(pretrain), name="pretrain", steps=pretrain_steps, flow_alpha=1.0)
        second = Stage(**vars(posttrain), name="posttrain", steps=posttrain_steps, flow_alpha=flow_alpha)
        return cls((first, second, *then))

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def reached(self) -> list[Stage]:
        """The stages that have steps."""
        return [stage for stage in self.stages if stage.steps]

    def first_step(self, stage: Stage) -> int:
        """The step that a stage begins with."""
        return sum(earlier.steps for earlier in self.stages[: self.stages.index(stage)])

    def at(self, step: int) -> Stage:
        """The stage of a step: the first one's are steps 0 .. its steps - 1; past the end it stays the last one's."""
        left = step
        for stage in self.reached:
            if left < stage.steps:
                return stage
            left -= stage.steps
        return self.reached[-1]

    def between(self, first: int, end: int) -> Iterator[tuple[Stage, int]]:
        """The stages of the steps first .. end - 1, and how many of these are in each, as `at` has it."""
        for stage in self.reached:
            begin = self.first_step(stage)
            stop = end if stage is self.reached[-1] else min(end, begin + stage.steps)
            if (steps := stop - max(first, begin)) > 0:
                yield stage, steps

    def number(self, step: int) -> int:
        """The place of a step's stage in the list, from 0."""
        return self.stages.index(self.at(step))

    def progress(self, step: int) -> tuple[int, int]:
        """How many steps of its stage come before a step, and how many the stage has."""
        stage = self.at(step)
        return step - self.first_step(stage), stage.steps

    def schedule(self, step: int) -> float:
        """Warm-up and cosine decay of the stage that the step is in: a factor on the learning rate."""
        stage = self.at(step)
        done, length = self.progress(step)
        if done < stage.warmup_steps:
            return (done + 1) / stage.warmup_steps
        progress = min(1.0, (done - stage.warmup_steps) / max(1, length - stage.warmup_steps))
        return stage.final_lr_factor + (1 - stage.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained in any stage that has steps."""
        return any(not stage.freezes(name) for stage in self.reached)

    def freezing(self, *patterns: str) -> Recipe:
        """The same recipe with more frozen parts, in every stage."""
        return replace(self, stages=tuple(replace(s, freeze=(*s.freeze, *patterns)) for s in self.stages))

    def check_followed(self, names: Collection[str]) -> None:
        """Raises ValueError for a regular expression that matches none of the parameters' names.

        And for a stage that ends before its warm-up.
        """
        for stage in self.reached:
            if stage.warmup_steps > stage.steps:
                raise ValueError(
                    f"stage {stage.name}: its warmup_steps are {stage.warmup_steps} and all of its steps {stage.steps},"
                    " so the learning rate is never reached: give fewer steps of warm-up, or more of training"
                )
            for option in ("freeze", "lr_factors"):
                for pattern in getattr(stage, option):
                    if not any(re.search(pattern, name) for name in names):
                        raise ValueError(
                            f"stage {stage.name}: {option} {pattern!r} matches no parameter of the model; their names"
                            f" are like {', '.join(list(names)[:: max(1, len(names) // 4)])}"
                        )

    def check_terms(self, known: Collection[str]) -> None:
        """Raises ValueError for a loss weight of a term that none of the model's heads has."""
        for stage in self.stages:
            if stage.steps and not stage.weights:
                raise ValueError(f"stage {stage.name} has steps and no loss that is above 0: give it one, or 0 steps")
            for name in stage.losses.used.keys() - set(known):
                raise ValueError(
                    f"stage {stage.name}: no head of this model has the loss {name!r}{suggestion(name, known)}; it has"
                    f" {', '.join(known)}. Others come with `model.heads`, and location with backbone_type"
                    " keypoint_gemma"
                )
