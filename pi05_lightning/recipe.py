"""The two-stage recipe: what counts, from which data, at which rate, as pure functions of the step.

Stage 1, pretrain:   L = CE(text) + CE(FAST), where text is captions, answers with boxes, and subtasks
Stage 2, posttrain:  L = CE(subtask) + flow_alpha · flow MSE            (π0.5, arXiv 2504.16054, eq. 1)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

StageName = Literal["pretrain", "posttrain"]


@dataclass(frozen=True)
class LossWeights:
    """Weight of every term; 0 leaves the term out of the computation altogether."""

    text: float = 0.0
    """Captions, answers, boxes."""
    subtask: float = 0.0
    fast: float = 0.0
    location: float = 0.0
    """Pointing: L1 distance, as a share of the image, between the keypoint that a box's question selects and the box's
    centre. Of the keypoint stem only, and not in π0.5: beside the boxes' cross-entropy, it is how a small model learns
    where things are."""
    flow: float = 0.0
    """Flow matching; in the posttrain stage this is multiplied by flow_alpha."""

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if weight < 0:
                raise ValueError(f"loss weight {name} is {weight}: it cannot be negative")


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    losses: LossWeights = field(default_factory=LossWeights)
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each `source/modality` in the draws; empty: all that the losses train, equally."""
    mixture_temperature: float = 0.0
    """Shares are multiplied by (number of samples) ** this: 0 takes them as they are, 1 draws by size."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; parameters whose name matches one are not trained in this stage."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Regular expression -> factor on the learning rate; the first that matches a parameter's name counts."""
    warmup_steps: int = 0
    final_lr_factor: float = 0.1
    """Cosine decay ends at this share of the learning rate at the stage's last step."""

    def __post_init__(self) -> None:
        if not 0 <= self.mixture_temperature <= 1:
            raise ValueError(
                f"mixture_temperature {self.mixture_temperature} is not within 0 (plain shares) and 1 (by size)"
            )
        for pattern in (*self.freeze, *self.lr_factors):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} in freeze or lr_factors is no regular expression: {error}") from error

    def freezes(self, name: str) -> bool:
        """Whether a parameter is frozen in this stage."""
        return any(re.search(pattern, name) for pattern in self.freeze)

    def lr_factor(self, name: str) -> float:
        """Factor on a parameter's learning rate: 0 for frozen ones."""
        if self.freezes(name):
            return 0.0
        return next((f for pattern, f in self.lr_factors.items() if re.search(pattern, name)), 1.0)


PRETRAIN = Stage(losses=LossWeights(text=1.0, subtask=1.0, fast=1.0))
POSTTRAIN = Stage(losses=LossWeights(subtask=1.0, flow=1.0))


@dataclass(frozen=True)
class Recipe:
    """Both stages and when one follows the other; steps are optimizer steps."""

    pretrain: Stage = PRETRAIN
    posttrain: Stage = POSTTRAIN
    pretrain_steps: int = 280_000
    posttrain_steps: int = 80_000
    flow_alpha: float = 10.0

    def __post_init__(self) -> None:
        if self.pretrain_steps < 0 or self.posttrain_steps < 0 or not self.total_steps:
            raise ValueError(
                f"pretrain_steps {self.pretrain_steps} and posttrain_steps {self.posttrain_steps}: no steps"
            )

    @property
    def total_steps(self) -> int:
        return self.pretrain_steps + self.posttrain_steps

    def stage_at(self, step: int) -> StageName:
        """Steps 0 .. pretrain_steps - 1 are the first stage's."""
        return "pretrain" if step < self.pretrain_steps else "posttrain"

    def at(self, step: int) -> Stage:
        return self.pretrain if self.stage_at(step) == "pretrain" else self.posttrain

    def loss_weights(self, step: int) -> LossWeights:
        """Weights at a step, flow_alpha applied."""
        weights = self.at(step).losses
        alpha = self.flow_alpha if self.stage_at(step) == "posttrain" else 1.0
        return replace(weights, flow=alpha * weights.flow)

    def progress(self, step: int) -> tuple[int, int]:
        """How many steps of its stage come before a step, and how many the stage has."""
        if self.stage_at(step) == "pretrain":
            return step, self.pretrain_steps
        return step - self.pretrain_steps, self.posttrain_steps

    def schedule(self, step: int) -> float:
        """Warm-up and cosine decay of the stage that the step is in: a factor on the learning rate."""
        stage = self.at(step)
        done, length = self.progress(step)
        if done < stage.warmup_steps:
            return (done + 1) / stage.warmup_steps
        progress = min(1.0, (done - stage.warmup_steps) / max(1, length - stage.warmup_steps))
        return stage.final_lr_factor + (1 - stage.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def stages(self) -> list[Stage]:
        """Those that have steps."""
        stages = (self.pretrain, self.pretrain_steps), (self.posttrain, self.posttrain_steps)
        return [stage for stage, steps in stages if steps]

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained in any stage that has steps."""
        return any(not stage.freezes(name) for stage in self.stages)

    def freezing(self, *patterns: str) -> Recipe:
        """The same recipe with more frozen parts, in both stages."""
        pretrain, posttrain = (replace(s, freeze=(*s.freeze, *patterns)) for s in (self.pretrain, self.posttrain))
        return replace(self, pretrain=pretrain, posttrain=posttrain)
