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


def test_scene_that_comes_mirrored_too_is_hardly_ever_said_to_be() -> None:
    """As of a desk whose drawer may stand on either side, with other things at random places."""

    def desk(side: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        image = np.full((3, 64, 64), [[[200.0]], [[180.0]], [[90.0]]])
        image[:, 20:] = np.array([90, 60, 40])[:, None, None]
        image[:, 8:32, 6:26] = 250
        for colour in ((255, 0, 0), (255, 220, 0), (10, 50, 255)):
            top, left = rng.integers(30, 50), rng.integers(0, 50)
            image[:, top : top + 14, left : left + 14] = np.array(colour)[:, None, None]
        return image[:, :, ::side].astype(np.uint8)

    look = Look.of(desk(side, seed) for seed, side in enumerate((1, -1, 1, 1, -1, 1, -1, 1, 1, -1, 1, 1)))
    assert look is not None
    seen = [look.shown_as(Look.of([desk(side, seed)])) for seed in range(100, 112) for side in (1, -1)]  # type: ignore[arg-type]
    assert seen.count("mirrored") <= 1  # it would be said of four, but for how the look is like itself


def test_a_checkpoint_carries_it_as_json() -> None:
    look = Look.of(scene(0))
    assert look is not None
    again = Look.from_dict(json.loads(json.dumps(look.to_dict())))
    np.testing.assert_array_equal(again.mean, look.mean)
    assert again.size == (48, 64)
    assert look.distance(again) == 0


def test_no_image_is_no_look() -> None:
    assert Look.of([]) is None
