"""π0.5 as one `nn.Module`: the backbone and the heads that read it. No Lightning, no data, no robot.

What differs from the paper (arXiv 2504.16054):
- The backbone never attends to the action expert, so the joint transformer is two calls, which is exact: the backbone,
  whose keys and values are kept, and the flow head, which attends to them. Training and inference run the same two.
- Several noise draws of an observation share one prefix; absent cameras and padding are not computed.
- The flow loss leaves out steps past the episode's end, which openpi and LeRobot train on. As openpi's it is of dims
  beyond the robot's too, which LeRobot leaves out.
- FAST tokens have ids below `<loc>`, where openpi puts them among the `<loc>` tokens (`fast_skip_tokens`).
- Laptop-size models see keypoints instead of SigLIP's patches (models/keypoints.py), and learn to point
  (models/heads/location.py).
- Where the paper says nothing: the templates of subtasks (data/prompt.py), random initialisation (`reset_parameters`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone, nothing_of
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import ByModality, Head, HeadFactory, Term, Terms
from pi05_lightning.models.heads.fast import FastHead
from pi05_lightning.models.heads.flow import FlowHead
from pi05_lightning.models.heads.location import NAME as LOCATION
from pi05_lightning.models.heads.location import LocationHead
from pi05_lightning.models.heads.subtask import SubtaskHead
from pi05_lightning.models.shards import unsharded
from pi05_lightning.types import Batch, HeadTargets

# Below 1e-38 a CPU takes several times as long for a product, and a training on keypoints makes many such numbers: they
# count as zero. At import, as a thread of PyTorch's takes it over when it is started. NumPy looks for the smallest such
# number once, and would warn that there is none.
np.finfo(np.float32), np.finfo(np.float64)
torch.set_flush_denormal(True)


class Pi05(nn.Module):
    """Backbone, subtask head, FAST head, flow head; and auxiliary heads, which policies do without.

    heads: further auxiliary heads by name.  Raises ValueError where two heads have a name or a term in common.
    """

    def __init__(self, config: ModelConfig, heads: Mapping[str, HeadFactory] | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.fast_head = FastHead(config.shapes)
        self.subtask_head = SubtaskHead(config.vocab_size, self.fast_head.ids)
        self.flow_head = FlowHead(config)
        own = {"subtask", "fast", "flow"} | ({LOCATION} if config.backbone_type == "keypoint_gemma" else set())
        for name in heads or {}:
            if name in own:
                raise ValueError(f"model.heads.{name}: the model has a head of this name: give yours another")
            if "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"model.heads.{name}: PyTorch takes no part of this name: give the head another")
        self.made_by = dict(heads or {})
        self.auxiliary = nn.ModuleDict({name: make(config) for name, make in self.made_by.items()})
        for name, part in self.auxiliary.named_modules():
            if loose := [key for key, value in vars(part).items() if isinstance(value, Tensor)]:
                raise ValueError(
                    f"model.heads.{name}: the tensors {', '.join(loose)} are neither parameters nor buffers, so they"
                    " would not move with the model: use `register_buffer`, with `persistent=False` if no checkpoint"
                    " needs them. What PyTorch itself keeps so, as torch.nn.utils.spectral_norm, has another form in"
                    " torch.nn.utils.parametrizations"
                )
        for name, head in self.auxiliary.items():
            if tied := _tied(head):
                raise ValueError(
                    f"model.heads.{name}: {' and '.join(tied)} are one parameter, and would become several: keep it in"
                    " one place, and use it from there"
                )
        if config.backbone_type == "keypoint_gemma":
            self.auxiliary[LOCATION] = LocationHead()
        names = [term for head in self.heads.values() for term in head.terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two heads have the loss {', '.join(twice)}: give one of them another name")

    @classmethod
    def without_memory(cls, config: ModelConfig, heads: Mapping[str, HeadFactory] | None = None) -> Self:
        """On the meta device: parts, names and shapes, and no values."""
        with torch.device("meta"):
            return cls(config, heads)

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
    def targets(self) -> dict[str, HeadTargets]:
        """What makes the heads' targets from frames, by the head's name."""
        return {
            name: HeadTargets(head.target_maker, frozenset().union(*head.terms.values(), *head.metrics.values()))
            for name, head in self.heads.items()
            if head.target_maker is not None
        }

    def forward(
        self,
        batch: Batch,
        terms: Collection[str] | None = None,
        *,
        insulate: bool = False,
        parts: Sequence[bool] | None = None,
    ) -> Terms:
        """Loss terms of a batch, from one backbone pass; those that it has no target for are not there.

        terms: names of those to compute, by default all.  insulate: the flow loss gives the backbone no gradient
        (knowledge insulation, arXiv 2505.23705).  The flow term needs the batch's noise and time.
        parts: which parts run, in the order of `parts_of`, by default those that the batch has something for. One that
        it has nothing for runs on no rows, and its gradients are 0.
        """
        if parts is not None:
            return self._in_step(batch, terms, insulate, parts)
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

    def parts_of(self, batch: Batch, terms: Collection[str]) -> list[bool]:
        """Whether a batch has images, and of each head whether it has targets of these terms."""
        targets = [
            any(mask.numel() for name, mask in head.masks(batch).items() if name in terms)
            for head in self.heads.values()
        ]
        return [len(batch.pixels) > 0, *targets]

    def _in_step(self, batch: Batch, terms: Collection[str] | None, insulate: bool, parts: Sequence[bool]) -> Terms:
        """As `forward`, with the layers called in the same order, and the same ones given gradients, on every rank."""
        need_vision, *used = parts
        heads = [head for head, is_used in zip(self.heads.values(), used, strict=True) if is_used]
        if not heads:
            return {}
        prefix = self.backbone(batch, need_hidden=any(h.reads_hidden for h in heads), need_vision=need_vision)
        found: Terms = {}
        for head in heads:
            seen = prefix.detach() if insulate and head.is_insulated else prefix
            try:
                found |= head.terms_of(batch, seen, self.backbone)
            except Exception as error:
                if head.has_targets(batch):
                    raise
                raise ValueError(
                    f"{type(head).__name__}: `loss` fails on a batch that has no targets for it ({error}). Where ranks"
                    " divide the weights between them it is called on every rank if any of them has some: give no"
                    " values for no targets"
                ) from error
        # what no loss reads here is read elsewhere
        hidden = [] if prefix.hidden is None else [prefix.hidden]
        zero = nothing_of(*hidden, *(term.values for term in found.values()))
        wanted = [name for head in heads for name in head.terms if terms is None or name in terms]
        result = {name: found[name] for name in wanted if name in found}
        if not result:
            empty = zero.new_zeros(0)
            result[wanted[0]] = Term(empty, empty.bool())
        first = next(iter(result))
        return result | {first: Term(result[first].values + zero, result[first].mask)}

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
        guidance: float = 1.0,
    ) -> Tensor:
        """Action chunks f32[B T D] of a batch without targets, from noise f32[B T D]; see `FlowHead.sample`.

        With guidance the batch has as many rows again, those without what is led to.
        """
        prefix = self.backbone(batch, need_hidden=False)
        return self.flow_head.sample(prefix, noise[:, None], num_steps, given, num_given, guidance)[:, 0]

    def reset_parameters(self, ordinal_ids: list[list[int]] | None = None) -> None:
        """Random initialisation; see `Backbone.reset_parameters`."""
        self.backbone.reset_parameters(ordinal_ids)
        self.flow_head.reset_parameters()
        self.reset_auxiliary()

    @torch.no_grad()
    def reset_auxiliary(self) -> None:
        """First values of the auxiliary heads, which no weights on disk have: those that they are made with."""
        for name, make in self.made_by.items():
            head, made = self.heads[name], make(self.config)
            with unsharded(head):
                for place, values in (*made.named_parameters(), *made.named_buffers()):
                    attrgetter(place)(head).copy_(values)  # of a layer with adapters, its own weight
                head.reset_parameters()

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Give the auxiliary heads the buffers that they are made with, of which a checkpoint may lack some."""
        for name, make in self.made_by.items():
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                made = make(self.config)
            for place, values in made.named_buffers():
                attrgetter(place)(self.heads[name]).copy_(values)

    @property
    def device(self) -> torch.device:
        return self.backbone.embed_tokens.weight.device


def _tied(head: nn.Module) -> list[str]:
    """The names of a parameter that several layers of a head have; none where there is no such parameter."""
    names = dict[nn.Parameter, list[str]]()
    for place, layer in head.named_modules():
        for name, parameter in layer.named_parameters(place, recurse=False, remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
    return next((found for found in names.values() if len(found) > 1), [])
