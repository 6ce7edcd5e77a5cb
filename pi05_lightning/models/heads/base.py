"""What a head is: something that is read off the prefix, with its targets, its loss terms and its metrics.

The model sums the terms of all its heads by name and knows none of them by name. A head of your own is a class like
these and one line of configuration (`model.heads`); a loss of your own is a head without parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Batch, Modality, Prefix, TargetMaker


class Term(NamedTuple):
    """A loss term or a metric before it is averaged: values f32[...], and where they count, bool[...]."""

    values: Tensor
    mask: Tensor


Terms = dict[str, Term]

ByModality = Mapping[str, frozenset[Modality]]
ROBOT_ACTIONS = frozenset({Modality.FAST, Modality.CONTINUOUS})
PREDICTS_TOKENS = frozenset(Modality) - {Modality.CONTINUOUS}


class Head(nn.Module, ABC):
    """Read off the prefix.

    terms: its loss terms, which a stage's `losses` weigh, each with the modalities whose samples may have it.
    metrics: what `measure` gives, each with the modalities that it is measured on.
    reads_hidden: it needs the prefix's hidden states, for which the whole last layer runs.
    is_insulated: under knowledge insulation (arXiv 2505.23705) it gives the backbone no gradient.
    target_maker: makes its targets from frames, where they are neither tokens nor actions.
    """

    terms: ClassVar[ByModality] = {}
    metrics: ClassVar[ByModality] = {}
    reads_hidden: ClassVar[bool] = False
    is_insulated: ClassVar[bool] = False
    target_maker: TargetMaker | None = None

    def has_targets(self, batch: Batch) -> bool:
        """Whether a batch has anything to learn from; known on the host."""
        return True

    @abstractmethod
    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        """Its terms of a batch that has targets, by name."""

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        """Its metrics of a batch that has targets, by name; without gradient."""
        return {}

    def reset_parameters(self) -> None:
        """Random initial values, whatever the parameters' memory held."""


HeadFactory = Callable[[ModelConfig], Head]
"""Makes a head for a model of these dimensions: a class whose first argument they are, and others from YAML."""
