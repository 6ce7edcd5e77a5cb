"""Mean images tell how a camera's images are turned, and whether red and blue are swapped."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pi05_lightning.data.looks import Look

CHANGES = {
    "": lambda image: image,
    "upside down": lambda image: image[:, ::-1],
    "mirrored": lambda image: image[:, :, ::-1],
    "turned by 180°": lambda image: image[:, ::-1, ::-1],
    "turned by 90° to the left": lambda image: np.rot90(image, 1, (1, 2)),
    "turned by 90° to the right": lambda image: np.rot90(image, -1, (1, 2)),
    "red and blue swapped": lambda image: image[::-1],
    "upside down, red and blue swapped": lambda image: image[::-1, ::-1],
}


def scene(seed: int, frames: int = 6, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A table below a wall, a lamp at the left, and a red thing that moves."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(frames):
        image = np.full((3, height, width), 180.0)
        image[:, height // 2 :] = np.array([140, 110, 70])[:, None, None]
        image[:, 4:16, 4:20] = 250
        top, left = rng.integers(20, height - 10), rng.integers(10, width - 10)
        image[:, top : top + 8, left : left + 8] = np.array([220, 30, 40])[:, None, None]
        images.append((image + rng.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8))
    return images


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_the_images_is_told(change: str) -> None:
    before, after = Look.of(scene(0)), Look.of(CHANGES[change](image) for image in scene(1))
    assert before is not None
    assert after is not None
    assert before.shown_as(after) == change


def test_another_scene_or_a_plain_one_tells_nothing() -> None:
    look, rng = Look.of(scene(0)), np.random.default_rng(0)
    other = Look.of([np.kron(rng.integers(0, 255, (3, 6, 8)), np.ones((8, 8))).astype(np.uint8)])
    plain = Look.of([np.full((3, 48, 64), 90, np.uint8)])
    assert look is not None
    assert other is not None
    assert plain is not None
    assert look.shown_as(other) is None
    assert look.shown_as(plain) is None


def test_a_checkpoint_carries_it_as_json() -> None:
    look = Look.of(scene(0))
    assert look is not None
    again = Look.from_dict(json.loads(json.dumps(look.to_dict())))
    np.testing.assert_array_equal(again.mean, look.mean)
    assert again.size == (48, 64)
    assert look.distance(again) == 0


def test_no_image_is_no_look() -> None:
    assert Look.of([]) is None
