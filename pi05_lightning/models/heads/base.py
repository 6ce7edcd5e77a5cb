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
    """Read off the prefix: it says where its loss terms count (`masks`), and then what they are there (`loss`).

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

    @abstractmethod
    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Which values of its terms count, bool[...] by the term's name; none, or an empty one, where nothing does.

        Of the batch alone, on whatever device that is: a step's elements are counted before its first backward pass, so
        that a term's mean is over all accumulated batches and ranks.
        """

    @abstractmethod
    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        """The terms of a batch that has targets, by name: values f32[...], in the shapes of their masks.

        In a sharded run (`trainer.strategy fsdp2`) also of one that has none, if another rank's has: no values,
        computed as others are, or nothing.
        """

    def has_targets(self, batch: Batch) -> bool:
        """Whether a batch has anything to learn from; by the masks' shapes, which the host knows."""
        return any(mask.numel() for mask in self.masks(batch).values())

    def terms_of(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        """Its terms with their masks. Raises ValueError where the two do not fit."""
        masks, values = self.masks(batch), self.loss(batch, prefix, backbone)
        shapes = [{name: list(x.shape) for name, x in found.items() if x.numel()} for found in (values, masks)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{type(self).__name__}: `loss` gives values of the shapes {shapes[0]} and `masks` of {shapes[1]}: they"
                " are to be of the same terms, in the same shapes"
            )
        return {name: Term(values[name], masks[name]) for name in values}

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        """Its metrics of a batch that has targets, by name; without gradient."""
        return {}

    def reset_parameters(self) -> None:
        """Other first values than those that `__init__` gives; called once they are there."""


HeadFactory = Callable[[ModelConfig], Head]
"""Makes a head for a model of these dimensions: a class whose first argument they are, and others from YAML."""
