"""π0.5 as one `nn.Module`: the backbone and the heads that read it. No Lightning, no data, no robot.

What differs from the paper (arXiv 2504.16054):
- The backbone never attends to the action expert, so the joint transformer is two calls, which is exact: the backbone,
  whose keys and values are kept, and the flow head, which attends to them. Training and inference run the same two.
- Several noise draws of an observation share one prefix; absent cameras and padding are not computed.
- The flow loss leaves out steps past the episode's end, which openpi and LeRobot train on.
- FAST tokens have ids below `<loc>`, where openpi puts them among the `<loc>` tokens (`fast_skip_tokens`).
- Laptop-size models see keypoints instead of SigLIP's patches (models/keypoints.py), and learn to point
  (models/heads/location.py).
- Where the paper says nothing: the templates of subtasks (data/prompt.py), random initialisation (`reset_parameters`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import ByModality, Head, HeadFactory, Terms
from pi05_lightning.models.heads.fast import FastHead
from pi05_lightning.models.heads.flow import FlowHead
from pi05_lightning.models.heads.location import NAME as LOCATION
from pi05_lightning.models.heads.location import LocationHead
from pi05_lightning.models.heads.subtask import SubtaskHead
from pi05_lightning.types import Batch, TargetMaker


class Pi05(nn.Module):
    """Backbone, subtask head, FAST head, flow head; and auxiliary heads, which policies do without.

    heads: further auxiliary heads by name.  Raises ValueError where two heads have a term of the same name.
    """

    def __init__(self, config: ModelConfig, heads: Mapping[str, HeadFactory] | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.fast_head = FastHead(config.vocab_size, config.fast_vocab_size, config.fast_skip_tokens)
        self.subtask_head = SubtaskHead(config.vocab_size, self.fast_head.ids)
        self.flow_head = FlowHead(config)
        self.auxiliary = nn.ModuleDict({name: make(config) for name, make in (heads or {}).items()})
        if config.backbone_type == "keypoint_gemma":
            self.auxiliary[LOCATION] = LocationHead()
        names = [term for head in self.heads.values() for term in head.terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two heads have the loss {', '.join(twice)}: give one of them another name")

    @property
    def heads(self) -> dict[str, Head]:
        """All heads by name."""
        auxiliary: dict[str, Head] = dict(self.auxiliary.items())  # type: ignore[arg-type]
        return {"subtask": self.subtask_head, "fast": self.fast_head, "flow": self.flow_head, **auxiliary}

    @property
    def terms(self) -> ByModality:
        """All loss terms, each with the modalities whose samples may have it."""
        return {term: modalities for head in self.heads.values() for term, modalities in head.terms.items()}

    @property
    def target_makers(self) -> dict[str, TargetMaker]:
        """What makes the heads' targets from frames, by the head's name."""
        return {name: head.target_maker for name, head in self.heads.items() if head.target_maker is not None}

    def forward(self, batch: Batch, terms: Collection[str] | None = None, *, insulate: bool = False) -> Terms:
        """Loss terms of a batch, from one backbone pass; those that it has no target for are not there.

        terms: names of those to compute, by default all.  insulate: the flow loss gives the backbone no gradient
        (knowledge insulation, arXiv 2505.23705).  The flow term needs the batch's noise and time.
        """
        heads = [
            head
            for head in self.heads.values()
            if (terms is None or not set(terms).isdisjoint(head.terms)) and head.has_targets(batch)
        ]
        prefix = self.backbone(batch, need_hidden=any(head.reads_hidden for head in heads))
        found: Terms = {}
        for head in heads:
            found |= head.terms_of(batch, prefix.detach() if insulate and head.is_insulated else prefix, self.backbone)
        return {name: term for name, term in found.items() if terms is None or name in terms}

    def counts(self, batch: Batch) -> Tensor:
        """Elements of each loss term in a batch, i64[terms] in the order of `terms`; the batch is on the host."""
        masks = {name: mask for head in self.heads.values() for name, mask in head.masks(batch).items()}
        return torch.tensor([int(masks[name].sum()) if name in masks else 0 for name in self.terms])

    @torch.no_grad()
    def chunk(
        self,
        batch: Batch,
        noise: Tensor,
        num_steps: int = 10,
        given: Tensor | None = None,
        num_given: Tensor | None = None,
    ) -> Tensor:
        """Action chunks f32[B T D] of a batch without targets, from noise f32[B T D]; see `FlowHead.sample`."""
        prefix = self.backbone(batch, need_hidden=False)
        return self.flow_head.sample(prefix, noise[:, None], num_steps, given, num_given)[:, 0]

    def reset_parameters(self, ordinal_ids: list[list[int]] | None = None) -> None:
        """Random initialisation; see `Backbone.reset_parameters`."""
        self.backbone.reset_parameters(ordinal_ids)
        for head in self.heads.values():
            head.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.backbone.embed_tokens.weight.device
