"""The location head: points at what a box names, with the keypoint stem. Not in π0.5; for laptop-size models.

Where a question asks for a box, its words point into the image, and the loss is the L1 distance to the box's centre. A
question that is the frame's instruction has the box of the thing that this is about: where the sample tells the
instruction, the prompt itself shall point there. The head has no parameters of its own: the pointer is part of the
stem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.heads.base import PREDICTS_TOKENS, Head, Terms
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.types import Batch, Frame, Modality, Prefix, text_to_boxes

NAME = "location"


@dataclass(frozen=True)
class Point:
    """Something that a box names: its question and its centre (y, x) in [0, 1] of one camera's image.

    told: whether the sample's prompt tells it.
    """

    camera: str
    query: str
    centre: tuple[float, float]
    told: bool


class Points:
    """The centres of the boxes that a frame's answers name.

    In a batch: image i64[Q] of each point;  tokens i64[Q M], token_mask bool[Q M]: what it is called;
    told bool[Q]: whether the prompt tells it;  centre f32[Q 2]: where it is, (y, x) in [0, 1].
    """

    def make(self, frame: Frame) -> tuple[Point, ...]:
        """Of the answers about images that the frame has; the first box of each. Those that are told, if any are."""
        points = tuple(
            Point(
                answer.camera,
                answer.question,
                ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
                told=answer.question == frame.task,
            )
            for answer in frame.answers
            if answer.camera in frame.images
            for box in text_to_boxes(answer.answer)[:1]
        )
        return tuple(point for point in points if point.told) or points

    def images(self, target: tuple[Point, ...]) -> set[str]:
        return {point.camera for point in target}

    def collate(
        self,
        targets: Sequence[tuple[Point, ...] | None],
        images: Sequence[Mapping[str, int]],
        encode: Callable[[str], list[int]],
    ) -> dict[str, Tensor]:
        points = [
            (numbers[point.camera], point)
            for row, numbers in zip(targets, images, strict=True)
            for camera in numbers
            for point in row or ()
            if point.camera == camera
        ]
        words = [torch.tensor(encode(point.query), dtype=torch.long) for _, point in points]
        tokens = pad_sequence(words, batch_first=True) if words else torch.zeros(0, 0, dtype=torch.long)
        lengths = torch.tensor([len(word) for word in words]).reshape(-1, 1)
        return {
            "image": torch.tensor([image for image, _ in points], dtype=torch.long),
            "tokens": tokens,
            "token_mask": torch.arange(tokens.shape[1]) < lengths,
            "told": torch.tensor([point.told for _, point in points], dtype=torch.bool),
            "centre": torch.tensor([point.centre for _, point in points]).reshape(-1, 2),
        }


class LocationHead(Head):
    """Loss term `location`: mean of |y| and |x| between where the stem points and the truth, a share of the image."""

    terms: ClassVar = {NAME: frozenset(Modality)}
    metrics: ClassVar = {"pointing_error": PREDICTS_TOKENS}
    target_maker = Points()

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        if NAME not in batch.auxiliary:
            return {}
        return {NAME: torch.ones_like(batch.auxiliary[NAME]["image"], dtype=torch.bool)}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        """Of each of the batch's Q points."""
        assert isinstance(backbone.vision, KeypointStem)
        asked = batch.auxiliary[NAME]
        words = backbone.embed_text(asked["tokens"]) * asked["token_mask"][..., None]
        query = words.sum(1) / asked["token_mask"].sum(1, keepdim=True)
        image = asked["image"]
        seen = {name: found[image] for name, found in prefix.vision.items()}
        pointed, _ = backbone.vision.point(query, seen, batch.camera[image])
        if "pointed" in prefix.vision:
            pointed = torch.where(asked["told"][:, None], prefix.vision["pointed"][image], pointed)
        return {NAME: (pointed - asked["centre"]).abs().mean(-1)}

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        return {"pointing_error": self.terms_of(batch, prefix, backbone)[NAME]}
