"""Batches of which one rank has something that another one has not, and what a sharded model makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed as dist
from small import make_batch, small_config, small_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig, VisionConfig
from pi05_lightning.models.heads.base import Head
from pi05_lightning.models.parallelize import Sharding, begin_sharded, checkpoint_blocks, shard
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Modality, Prefix, Target

EVERYTHING = ("text", "subtask", "fast", "flow", "own")
PATCHES = small_config()
KEYPOINTS = replace(
    small_config(),
    backbone_type="keypoint_gemma",
    vision=VisionConfig(image_size=16, width=8, num_heads=1, num_keypoints=8, keypoints_per_token=4, max_cameras=2),
)


class OwnHead(Head):
    """A head with a layer of its own, which learns from subtasks."""

    terms: ClassVar = {"own": frozenset(Modality)}
    reads_hidden = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.language.width, 1)

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        return {"own": torch.ones_like(batch.target_index[Target.SUBTASK], dtype=torch.bool)}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        assert prefix.hidden is not None
        return {"own": self.layer(prefix.hidden.flatten(0, 1)[batch.target_index[Target.SUBTASK]])[:, 0].square()}


@dataclass(frozen=True)
class Kind:
    """rows: of each rank, see `make_batch`.  acting: how many of them have actions.  terms: that the stage weighs.
    points: how many each rank has to point at."""

    rows: tuple[list[str], list[str]]
    acting: tuple[int, int] = (0, 0)
    terms: tuple[str, ...] = EVERYTHING
    insulate: bool = False
    config: ModelConfig = PATCHES
    points: tuple[int, int] | None = None

    def batch(self, rank: int) -> Batch:
        batch = make_batch(self.config, self.rows[rank], acting=self.acting[rank], draws=2, seed=rank)
        if self.points is not None:
            number = self.points[rank]
            batch.auxiliary["location"] = {
                "image": torch.zeros(number, dtype=torch.long),
                "tokens": torch.full((number, 2 if number else 0), 7),
                "token_mask": torch.ones(number, 2 if number else 0, dtype=torch.bool),
                "centre": torch.full((number, 2), 0.3),
            }
        return batch

    def losses(self, model: Pi05, rank: int, sharding: Sharding | None = None) -> Iterator[Tensor]:
        batch = self.batch(rank)
        parts = sharding and sharding.anywhere(model.parts_of(batch, self.terms))
        for term in model(batch, self.terms, insulate=self.insulate, parts=parts).values():
            yield term.values.sum()


KINDS = {
    "images on one rank": Kind((["ippss"], ["ppss"])),
    "actions on one rank": Kind((["ippss", "ipps"], ["ippss"]), acting=(2, 0)),
    "actions alone, on one rank": Kind((["ipp"], ["iipp"]), acting=(0, 1)),
    "text on one rank, subtasks on the other": Kind((["ipptt"], ["ippss"])),
    "FAST tokens on one rank": Kind((["ippssff"], ["ippss"])),
    "targets on one rank": Kind((["ippss"], ["ipp"])),
    "nothing but a prompt on one rank": Kind((["pp"], ["iippttt", "ippssff"]), acting=(0, 1)),
    "nothing on any rank": Kind((["ipp"], ["pp"])),
    "targets that the stage does not weigh": Kind((["ipptt"], ["ippss"]), terms=("subtask",)),
    "targets that the stage does not weigh, and actions": Kind((["pptt"], ["pp"]), (0, 1), terms=("flow",)),
    "insulated actions on one rank": Kind((["ippss"], ["ippss"]), (0, 1), insulate=True),
    "insulated actions alone": Kind((["ipp"], ["pp"]), (0, 1), insulate=True),
    "keypoints on one rank": Kind(
        (["ippss"], ["ppss"]), terms=("subtask", "location"), config=KEYPOINTS, points=(0, 0)
    ),
    "places on one rank": Kind((["ippss"], ["ipptt"]), terms=("text", "location"), config=KEYPOINTS, points=(2, 0)),
    "places alone, on one rank": Kind((["pp"], ["ipp"]), terms=("location",), config=KEYPOINTS, points=(0, 1)),
}


def model_of(kind: Kind) -> Pi05:
    torch.manual_seed(0)
    model = small_model(kind.config)
    model.auxiliary["own"] = OwnHead(kind.config)
    return model


def gradients(model: Pi05) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def of_one_process(kind: Kind) -> dict[str, Tensor]:
    """Gradients of the mean over ranks, of one process that has the batches of both."""
    model = model_of(kind)
    losses = [loss / 2 for rank in range(2) for loss in kind.losses(model, rank)]
    if losses:
        torch.stack(losses).sum().backward()
    return gradients(model)


def of_two_ranks(checkpointing: bool) -> dict[str, dict[str, Tensor]]:
    """Gradients of every kind of batches, of two steps after each other."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sharding = Sharding(init_device_mesh("cpu", (2,)))
    found = {}
    for name, kind in KINDS.items():
        model = model_of(kind)
        shard(model, sharding)
        begin_sharded(model)
        if checkpointing:
            checkpoint_blocks(model)
        for _ in range(2):
            model.zero_grad()
            losses = [*kind.losses(model, rank, sharding)]
            if losses:
                torch.stack(losses).sum().backward()
        found[name] = gradients(model)
    dist.destroy_process_group()
    return found
