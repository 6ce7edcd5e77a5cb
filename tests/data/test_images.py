from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from PIL import Image

from pi05_lightning.data.errors import BadImage
from pi05_lightning.data.images import read_image, resize_image, resize_with_pad, rgb_array

SHAPES = [(48, 64), (64, 48), (480, 640), (7, 5), (224, 224), (225, 223), (6, 5)]


def random_images(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_bytes_is_lerobots_float_resize_rounded(shape: tuple[int, int]) -> None:
    images = random_images(shape)
    reference = resize_with_pad_torch(images.float() / 255, 224, 224) * 255
    ours = resize_with_pad(images, (224, 224))
    assert ours.dtype == torch.uint8
    torch.testing.assert_close(ours.float(), reference, atol=0.501, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_floats_is_lerobots_resize(shape: tuple[int, int]) -> None:
    images = random_images(shape).float() / 255
    torch.testing.assert_close(resize_with_pad(images, (224, 224)), resize_with_pad_torch(images, 224, 224))


def test_a_very_narrow_image_keeps_one_row() -> None:
    resized = resize_with_pad(torch.full((1, 3, 1, 300), 9, dtype=torch.uint8), (32, 32))
    assert (resized[0, 0] == 9).sum() == 32


def test_the_pad_is_black_and_centred() -> None:
    resized = resize_image(np.full((3, 10, 20), 200, np.uint8), (20, 20))
    assert (resized[:, 5:15] == 200).all()
    assert not resized[:, :5].any()
    assert not resized[:, 15:].any()


def test_grey_levels_are_the_same_in_every_channel() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(rgb_array(Image.fromarray(grey), convert=True), np.stack([grey] * 3))


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    np.testing.assert_array_equal(read_image(tmp_path / "depth.png", convert=True)[0], [[0, 1, 128, 255]])


def test_transparency_is_laid_over_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], dtype=np.uint8)
    rgb = rgb_array(Image.fromarray(pixels, "RGBA"), convert=True)
    np.testing.assert_array_equal(rgb[:, 0].T, [[10, 20, 30], [255] * 3])


def test_a_palette_becomes_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.putdata([0, 1])
    np.testing.assert_array_equal(rgb_array(image)[:, 0].T, [[1, 2, 3], [200, 100, 50]])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_three_channels_of_bytes(mode: str) -> None:
    array = rgb_array(Image.new(mode, (6, 4)), convert=True)
    assert array.shape == (3, 4, 6)
    assert array.dtype == np.uint8


def deep_png() -> bytes:
    """A PNG of 16 bits in each of three channels, which Pillow opens as RGB."""
    pixels = b"".join(b"\0" + struct.pack(">12H", *range(12)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def png(mode: str) -> bytes:
    stored = io.BytesIO()
    Image.new(mode, (6, 4)).save(stored, "png")
    return stored.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (png("1"), "grey"),
        (png("L"), "grey"),
        (png("LA"), "grey"),
        (png("RGBA"), "transparent"),
        (png("I;16"), "16-bit"),
        (deep_png(), "16-bit"),
    ],
    ids=["bits", "grey", "grey and alpha", "RGBA", "16 bits", "3 x 16 bits"],
)
def test_an_image_that_is_not_rgb_of_bytes_is_refused_unless_it_is_to_be_converted(content: bytes, kind: str) -> None:
    with pytest.raises(BadImage, match=f"the image is {kind}, not RGB of 8 bits; `convert_images: true`"):
        read_image(content)
    assert read_image(content, convert=True).shape[0] == 3


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_colours_of_bytes_need_no_conversion(mode: str) -> None:
    assert read_image(png(mode)).shape == (3, 4, 6)


def test_a_turned_photograph_is_turned_upright() -> None:
    image = Image.new("RGB", (6, 4))
    image.getexif()[0x0112] = 6  # orientation: rotated by 90°
    stored = io.BytesIO()
    image.save(stored, "jpeg", exif=image.getexif())
    assert read_image(stored.getvalue()).shape == (3, 6, 4)


def test_floating_point_images_are_refused() -> None:
    with pytest.raises(BadImage, match="unknown range"):
        rgb_array(Image.new("F", (2, 2)))


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_damaged_image_is_an_error(form: str) -> None:
    stored = io.BytesIO()
    Image.fromarray(random_images((40, 40))[0].permute(1, 2, 0).numpy()).save(stored, form)
    with pytest.raises(BadImage, match=r"an image of \d+ bytes cannot be read"):
        read_image(stored.getvalue()[:200])


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
