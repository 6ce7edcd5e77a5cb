"""Augmentation: a function of the sample's key and camera, only in training, never where it would move a box."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pi05_lightning.data.augment import Augmentation, augment
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.types import Answer, Batch, Frame, Modality, Shapes, Subset, box_to_text

TOKENIZER = TextTokenizer.load("tiny")
CAMERAS = ("top", "left_wrist")
PROCESSOR = Processor(Shapes(32, 4, 4, TOKENIZER.vocab_size, 32, 0), TOKENIZER, CAMERAS, {})
ANGLE, SCALE, RIGHT, DOWN = range(4)


def batch(*answers: str, first_key: int = 0) -> Batch:
    """One row per answer, each with both cameras."""
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (3, 32, 32), dtype=np.uint8) for camera in CAMERAS}
    frames = [Frame(images=images, answers=(Answer("what?", answer),)) for answer in answers]
    return PROCESSOR.collate(
        [PROCESSOR.sample(frame, Subset("", Modality.QA), key=first_key + i) for i, frame in enumerate(frames)]
    )


def draw(which: Batch, augmentation: Augmentation = Augmentation()) -> Batch:  # noqa: B008
    return augmentation.draw(which, CAMERAS, TOKENIZER.loc_ids)


def test_what_happens_to_an_image_depends_on_its_samples_key_alone() -> None:
    whole, alone = draw(batch("a", "b", "c")), draw(batch("b", first_key=1))
    np.testing.assert_array_equal(whole.augmentation[2:4], alone.augmentation)
    assert torch.equal(augment(whole).pixels[2:4], augment(alone).pixels)


def test_samples_and_cameras_differ() -> None:
    drawn = draw(batch("a", "b")).augmentation
    assert len(np.unique(drawn[:, -1])) == 4


def test_wrist_cameras_are_not_rotated() -> None:
    drawn = draw(batch(*"abcdefgh")).augmentation
    assert (drawn[1::2, ANGLE] == 0).all()
    assert (drawn[::2, ANGLE] != 0).all()


def test_images_whose_boxes_are_told_keep_their_geometry() -> None:
    drawn = draw(batch(box_to_text((0.1, 0.1, 0.5, 0.5)), "nothing")).augmentation
    np.testing.assert_array_equal(drawn[:2, : DOWN + 1], [[0, 1, 0, 0]] * 2)
    assert (drawn[:2, DOWN + 1 :] != 1).all()
    assert drawn[2, SCALE] == pytest.approx(1 / 0.95)


def test_changes_stay_within_their_bounds() -> None:
    drawn = draw(batch(*"abcdefghijklmnop")).augmentation
    assert np.abs(drawn[:, ANGLE]).max() <= 5
    assert np.abs(drawn[:, [RIGHT, DOWN]]).max() <= (1 / 0.95 - 1) / 2
    for column, amount in enumerate((0.3, 0.4, 0.5), DOWN + 1):
        assert np.abs(drawn[:, column] - 1).max() <= amount
        assert np.ptp(drawn[:, column]) > amount


def test_pixels_stay_bytes_and_change() -> None:
    before = draw(batch("a"))
    after = augment(before)
    assert after.pixels.dtype == torch.uint8
    assert after.pixels.shape == before.pixels.shape
    assert not torch.equal(after.pixels, before.pixels)


def test_an_image_becomes_what_torchvision_makes_of_it() -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8, generator=torch.manual_seed(0)) * 255, (48, 64))
    before = replace(draw(batch("a", "b")), pixels=smooth.byte().expand(4, -1, -1, -1))
    for found, image, drawn in zip(augment(before).pixels, before.pixels, before.augmentation.tolist(), strict=True):
        angle, scale, right, down, brightness, contrast, saturation = drawn
        shift = [right * 64, down * 48]
        image = image.float() / 255  # with bytes it rounds down after every step
        image = tv.affine(image, angle, shift, scale, shear=[0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
        image = tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast)
        expected = 255 * tv.adjust_saturation(image, saturation)
        assert (found - expected).abs().max() < 0.6


def test_a_crop_without_colour_and_rotation_shows_a_part_of_the_image_larger() -> None:
    only_crop = Augmentation(crop=0.5, rotation=0, brightness=0, contrast=0, saturation=0)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    before = batch("a")
    before.pixels[0] = torch.stack([4 * x, 4 * y, 0 * x])
    image = augment(draw(before, only_crop)).pixels[0].float()
    assert image[0].diff(dim=1)[:, 1:-1].mean() == pytest.approx(2, abs=0.1)  # the gradient of 4, at twice the size
    assert image[0].min() >= 0
    assert np.ptp(image[0].numpy()) <= 4 * 17


def test_a_batch_that_drew_nothing_is_left_as_it_is() -> None:
    plain = batch("a")
    assert augment(plain) is plain


def test_a_batch_of_text_alone_is_left_as_it_is() -> None:
    text = PROCESSOR.collate([PROCESSOR.sample(Frame(answers=(Answer("what?", "that"),)), Subset("", Modality.QA))])
    assert len(augment(draw(text)).pixels) == 0


def test_no_augmentation_at_all_is_the_identity() -> None:
    nothing = Augmentation(crop=1, rotation=0, brightness=0, contrast=0, saturation=0)
    before = batch("a", "b")
    assert torch.equal(augment(draw(before, nothing)).pixels, before.pixels)


def test_what_was_drawn_moves_with_the_batch() -> None:
    drawn = draw(batch("a"))
    moved = replace(drawn).to("cpu", non_blocking=True)
    np.testing.assert_array_equal(moved.augmentation, drawn.augmentation)


@pytest.mark.parametrize("wrong", [{"crop": 0}, {"crop": 1.1}, {"rotation": -1}, {"brightness": 2}])
def test_amounts_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"augmentation\.{next(iter(wrong))} is"):
        Augmentation(**wrong)
