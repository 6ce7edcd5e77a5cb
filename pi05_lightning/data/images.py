"""Images as the model takes them: RGB, uint8, at one size, resized the same way for training and inference."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pi05_lightning.data.errors import BadImage
from pi05_lightning.data.open_files import check_open_files
from pi05_lightning.types import Letterbox

# What Pillow's decoders raise on damaged files, besides OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def resize_with_pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale images into `size`, keeping their aspect: bilinear, no antialias, centred, the rest zero.

    images: u8[N 3 h w] or f32[N 3 h w];  size: (H, W).  Returns the same dtype at [N 3 H W].
    As openpi and LeRobot do it; there images are floats, so uint8 differs by rounding, half a grey level at most.
    """
    if images.shape[-2:] == size:
        return images
    inner = Letterbox.of(images.shape[-2:], size)
    scaled = F.interpolate(images.float(), size=(inner.height, inner.width), mode="bilinear", align_corners=False)
    scaled = scaled.round_() if images.dtype == torch.uint8 else scaled
    padded = images.new_zeros((*images.shape[:2], *size))
    padded[..., inner.rows, inner.columns] = scaled
    return padded


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`resize_with_pad` for one numpy image, u8[3 h w] -> u8[3 H W]."""
    return resize_with_pad(torch.from_numpy(np.require(image, requirements=["C", "W"]))[None], size)[0].numpy()


def rgb_array(image: Image.Image, convert: bool = False) -> np.ndarray:
    """A Pillow image as RGB u8[3 h w], upright by the camera's orientation tag.

    convert: take also what is no colour image of 8 bits: grey levels enter every channel, 16-bit ones scaled to 8, and
    transparency is laid over white.  Raises BadImage for such images otherwise, and for floating-point ones, whose
    range nothing tells.
    """
    if image.mode == "F":
        raise BadImage("the image holds floating-point values of unknown range; store it with 8 or 16 bits a channel")
    if not convert and (kind := _other_than_rgb(image)):
        raise BadImage(f"the image is {kind}, not RGB of 8 bits; `convert_images: true` takes it nevertheless")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)  # 257 = 65535 / 255
        return np.repeat(grey[None], 3, axis=0)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def as_bytes(image: np.ndarray) -> np.ndarray:
    """u8 of an image of bytes, or of floats in 0..255, of any shape."""
    return image if image.dtype == np.uint8 else image.round().clip(0, 255).astype(np.uint8)


def _other_than_rgb(image: Image.Image) -> str | None:
    """What an image is, in a word, that has more or less to it than three channels of 8 bits; None for all others."""
    tiles = getattr(image, "tile", ())  # of a file: Pillow opens RGB of 16 bits as if it had 8
    if image.mode.startswith("I") or any(";16" in str(tile.args) for tile in tiles):
        return "16-bit"
    if image.mode in ("1", "L", "LA", "La"):
        return "grey"
    return "transparent" if image.has_transparency_data else None


def find_stored(path: str, folders: Sequence[Path]) -> Path | None:
    """The file that a stored path names, in the first folder that has it."""
    return next((folder / path for folder in folders if (folder / path).exists()), None)


def read_stored(stored: Any, folders: Sequence[Path], convert: bool) -> np.ndarray:
    """An image as `datasets` stores it, encoded or as a path from one of the folders; raises BadImage."""
    path = None
    if isinstance(stored, dict):
        path, stored = stored.get("path"), stored.get("bytes")
    elif isinstance(stored, str):
        path, stored = stored, None
    if stored:
        return read_image(stored, convert)
    if not path:
        raise BadImage("no image is stored")
    found = find_stored(path, folders)
    if found is None:
        places = dict.fromkeys(str(folder / path) for folder in folders)
        raise BadImage(f"there is no {' or '.join(places)}")
    return read_image(found, convert)


def read_image(source: Path | bytes, convert: bool = False) -> np.ndarray:
    """An image file, or the bytes of one (PNG, JPEG, …), as `rgb_array`; raises BadImage also when it is damaged."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return rgb_array(image, convert)
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        check_open_files(error, "an image" if isinstance(source, bytes) else source)
        what = f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise BadImage(f"{what} cannot be read ({reason})") from error
