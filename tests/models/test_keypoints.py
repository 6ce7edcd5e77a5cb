"""The keypoint stem: one token per image says where the words of its row's prompt point, and what teaches that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pi05_lightning.models.config import VisionConfig
from pi05_lightning.models.heads.location import NAME, LocationHead, Points
from pi05_lightning.models.keypoints import KeypointStem, places
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Answer, Batch, Frame, box_to_text

from .small import change_column, make_batch, small_config, small_model

VISION = VisionConfig(16, width=8, num_heads=1, num_keypoints=4, keypoints_per_token=4, points_at_prompt=True)
ROWS = ["iippp", "ppp", "ipppss"]


@pytest.fixture(scope="module", params=[0, 2])
def model(request: pytest.FixtureRequest) -> Pi05:
    return small_model(small_config(backbone_type="keypoint_gemma", vision=replace(VISION, named_maps=request.param)))


def tokens(model: Pi05, batch: Batch) -> Tensor:
    """The embeddings of each row's images, [B C N W]."""
    with torch.no_grad():
        columns = model.backbone.embed(batch)[0][:, : 2 * batch.image_mask.shape[1]]
    return columns.unflatten(1, (-1, 2))


def test_places_are_down_and_across() -> None:
    heat = torch.full((1, 5, 9), -50.0)
    heat[0, 1, 6] = 50.0
    torch.testing.assert_close(places(heat), torch.tensor([[1 / 4, 6 / 8]]))


@pytest.mark.parametrize("num_named", [0, 2])
def test_places_are_as_exact_under_autocast(num_named: int) -> None:
    stem = KeypointStem(replace(VISION, named_maps=num_named), 32)
    torch.manual_seed(0)
    stem.reset_parameters()
    query, camera = torch.randn(64, 32), torch.zeros(64, dtype=torch.int64)
    seen = stem.look(torch.rand(64, 3, 16, 16) * 2 - 1, camera)
    heat = 5 * torch.randn(64, 6, 6)
    exact = places(heat)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(places(heat), exact)
        pointed, found = stem.point(query, seen, camera)
        assert pointed.dtype == found.dtype == torch.float32
        assert (pointed != pointed.bfloat16()).float().mean() > 0.9


def test_every_camera_has_maps_and_projections_of_its_own(model: Pi05) -> None:
    stem = model.backbone.vision
    assert isinstance(stem, KeypointStem)
    image, cameras = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1) * 2 - 1, torch.tensor([0, 1])
    with torch.no_grad():
        keypoints = stem.look(image, cameras)["keypoints"]
        assert (keypoints[0] != keypoints[1]).any()
        before = stem(image, cameras)[0] - stem.identity[cameras]
        projection = stem.projection[1].clone()
        stem.projection[1] *= 2
        after = stem(image, cameras)[0] - stem.identity[cameras]
        stem.projection[1] = projection
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1, 0], 2 * before[1, 0])


def test_last_token_of_an_image_says_where_the_prompt_points(model: Pi05) -> None:
    batch = make_batch(model.config, ROWS)
    stem = model.backbone.vision
    assert isinstance(stem, KeypointStem)
    assert stem.num_tokens == 2
    found = tokens(model, batch)
    with torch.no_grad():
        seen = stem.look(batch.pixels / 127.5 - 1, batch.camera)
        for image, (row, prompt) in enumerate([(0, 3), (0, 3), (2, 3)]):
            camera = batch.camera[image]
            words = model.backbone.embed_text(batch.tokens[row, :prompt]).mean(0)
            of_image = {name: found[[image]] for name, found in seen.items()}
            mean, named = stem.point(words[None], of_image, camera[None])
            angles = torch.pi * 2.0 ** torch.arange(stem.octaves) * torch.cat([mean[:, None], named], 1)[0, ..., None]
            expected = torch.cat([angles.sin(), angles.cos()], -1).flatten() @ stem.pointed[camera]
            torch.testing.assert_close(found[row, camera, 1], expected + stem.identity[camera, 1], rtol=1e-4, atol=1e-5)


def test_it_depends_on_the_prompt_of_its_own_row_and_on_nothing_that_is_said(model: Pi05) -> None:
    batch = make_batch(model.config, ROWS)
    before = tokens(model, batch)
    slots = batch.image_mask.shape[1]
    asked_otherwise = tokens(model, change_column(batch, slots + 1, row=0))
    assert (asked_otherwise[0, :, 1] != before[0, :, 1]).any(-1).all()
    assert torch.equal(asked_otherwise[0, :, 0], before[0, :, 0])
    assert torch.equal(asked_otherwise[2], before[2])
    assert torch.equal(tokens(model, change_column(batch, slots + 4, row=2)), before)  # a subtask, to be predicted


def test_without_it_there_are_as_many_tokens_as_groups_of_keypoints() -> None:
    assert KeypointStem(replace(VISION, points_at_prompt=False), 32).num_tokens == 1


def test_what_the_prompt_tells_is_where_the_prompt_points_and_the_rest_where_its_own_words_do(model: Pi05) -> None:
    stem, backbone = model.backbone.vision, model.backbone
    assert isinstance(stem, KeypointStem)
    centre = torch.tensor([[0.2, 0.7], [0.2, 0.7]])
    batch = make_batch(model.config, ROWS)
    points = {
        "image": torch.tensor([2, 2]),  # the third row's
        "tokens": torch.tensor([[5, 6], [5, 6]]),
        "token_mask": torch.ones(2, 2, dtype=torch.bool),
        "told": torch.tensor([True, False]),
        "centre": centre,
    }
    batch = replace(batch, auxiliary={NAME: points})
    with torch.no_grad():
        prefix = backbone(batch)
        found = LocationHead().loss(batch, prefix, backbone)[NAME]
        prompt, words = (
            backbone.embed_text(batch.tokens[2, :3]).mean(0),
            backbone.embed_text(torch.tensor([5, 6])).mean(0),
        )
        seen = {name: found[[2]] for name, found in prefix.vision.items()}
        pointed = [stem.point(query[None], seen, batch.camera[[2]])[0][0] for query in (prompt, words)]
    torch.testing.assert_close(found, (torch.stack(pointed) - centre).abs().mean(-1))
    assert found[0] != found[1]


def test_instruction_that_is_told_is_what_the_points_of_a_sample_are_about() -> None:
    image = np.zeros((3, 8, 8), np.uint8)
    box = box_to_text((0.0, 0.0, 0.5, 0.25))
    answers = (
        Answer("detect the lid", box, "top"),
        Answer("lift the lid", box, "top"),
        Answer("lift the lid", box, "a camera that the sample does not show"),
        Answer("is it open?", "no", "top"),
    )
    frame = Frame({"top": image}, task="lift the lid", answers=answers)
    (point,) = Points().make(frame)
    assert (point.query, point.told) == ("lift the lid", True)
    untold = Points().make(replace(frame, task=""))
    assert [(point.query, point.told) for point in untold] == [("detect the lid", False), ("lift the lid", False)]
