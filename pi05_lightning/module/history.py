"""What the weights were trained on so far: before this training, and in its steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.data.processor import Processor
from pi05_lightning.models.heads.base import Head
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.recipe import Recipe, Stage
from pi05_lightning.weights.abilities import ADVANTAGE, Trained, trained


@dataclass
class History:
    """Of a module's weights, up to an optimizer step.

    before: what they were trained on by then.  step: that step.  processor: what made the samples that they were
    trained on; None where nothing was trained or loaded yet.
    """

    before: Trained = field(default_factory=lambda: Trained(complete=True))
    step: int = 0
    processor: Processor | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> History:
        saved = checkpoint["pi05"]
        before = Trained.from_dict(saved.get("trained", {}))
        return cls(before, checkpoint["global_step"], Processor.from_dict(saved["processor"]))

    def until(self, step: int, recipe: Recipe, max_delay: int, learned: Callable[[Stage], Collection[str]]) -> Trained:
        """What they were trained on by a later step of a recipe. max_delay, learned: of the steps between."""
        return self.before + trained(recipe, self.step, step, max_delay, learned)


def trained_heads(stage: Stage, model: Pi05) -> list[Head]:
    """Those heads that a stage's freezing leaves something to learn."""
    backbone = list(model.backbone.parameters())
    trained = {parameter for name, parameter in model.named_parameters() if not stage.freezes(name)}
    # what predicts tokens has no weights of its own
    return [head for head in model.heads.values() if not trained.isdisjoint(list(head.parameters()) or backbone)]


def learned(stage: Stage, model: Pi05, data: Pi05DataModule) -> list[str]:
    """A stage's loss terms that its data has samples of, and that its freezing leaves something to learn."""
    fed, found = data.fed(stage), []
    for head in trained_heads(stage, model):
        found += [t for t in stage.weights if t in head.terms and t in fed]
    acts = not {"flow", "fast"}.isdisjoint(found)
    return [*found, ADVANTAGE] if acts and data.tells_advantage(stage) else found
