"""Image augmentation, on the device, after the batch was moved there: crop, rotation, colour.

What is done to an image is drawn with the batch, from the sample's key, so that a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_lightning.files.ranges import check_range
from pi05_lightning.types import Batch, Target


@dataclass(frozen=True)
class Augmentation:
    """How far images are changed at random; the defaults are openpi's, which does not crop wrist cameras either."""

    crop: float = 0.95
    """Share of height and width that is kept and scaled up again; 1 for no crop."""
    rotation: float = 5.0
    """Largest angle in degrees, either way."""
    brightness: float = 0.3
    """Factors are drawn from 1 - this to 1 + this."""
    contrast: float = 0.4
    """The same for contrast."""
    saturation: float = 0.5
    """The same for saturation."""
    not_rotated: tuple[str, ...] = ("wrist",)
    """Cameras whose name contains one of these words are not rotated: they see the gripper always at one angle."""

    def __post_init__(self) -> None:
        check_range("augmentation.crop", self.crop, 0, 1, above=True)
        check_range("augmentation.rotation", self.rotation, 0, 180)
        for name in ("brightness", "contrast", "saturation"):
            check_range(f"augmentation.{name}", getattr(self, name), 0, 1)

    def draw(self, batch: Batch, cameras: Sequence[str], loc_ids: range) -> Batch:
        """The batch with `augmentation` drawn, on the host: f32[P 7], see `Batch`.

        cameras: names by the numbers in `batch.camera`.  Images with a box or a point among what the row says
        (loc_ids), or among its targets, keep their geometry, since that would no longer be where it says.
        """
        row = (batch.image_index // max(batch.image_mask.shape[1], 1)).tolist()
        places = (batch.tokens >= loc_ids.start) & (batch.tokens < loc_ids.stop)
        told = (places & (batch.target_kind != Target.FAST)).any(dim=1).tolist()  # FAST tokens may have the same ids
        fixed = [False] * len(row) if batch.fixed_image is None else batch.fixed_image.tolist()
        keys, names = batch.key.tolist(), [cameras[camera] for camera in batch.camera.tolist()]
        drawn = np.empty((len(row), 7), np.float32)
        for image, (r, name) in enumerate(zip(row, names, strict=True)):
            # one stream per sample and camera: an image's fate does not hang on what else is in the batch
            rng = np.random.Generator(np.random.Philox(key=[keys[r] % 2**63, 16 + list(cameras).index(name)]))
            angle, right, down, brightness, contrast, saturation = rng.uniform(-1, 1, 6)
            moves = not (told[r] or fixed[image])
            turns = moves and not any(word in name for word in self.not_rotated)
            margin = (1 / self.crop - 1) / 2  # of the image's size, once the crop is scaled up
            drawn[image] = (
                angle * self.rotation * turns,
                1 / self.crop if moves else 1,
                right * margin * moves,
                down * margin * moves,
                1 + brightness * self.brightness,
                1 + contrast * self.contrast,
                1 + saturation * self.saturation,
            )
        return replace(batch, augmentation=torch.from_numpy(drawn))


def augment(batch: Batch) -> Batch:
    """The batch with its images changed as `Augmentation.draw` said, on their device; unchanged where it said nothing.

    Still u8; what comes into view from outside an image is black.
    """
    if batch.augmentation is None or not len(batch.pixels):
        return batch
    return replace(batch, pixels=_changed(batch.pixels, batch.augmentation), augmentation=None)


def _changed(images: Tensor, drawn: Tensor) -> Tensor:
    """u8[P 3 H W] by f32[P 7], all at once, as torchvision's functions do one by one.

    Nobody looks at what was drawn: the host would wait for the device.
    """
    angle, scale, right, down, brightness, contrast, saturation = drawn[..., None, None].unbind(1)
    height, width = images.shape[-2:]
    cos, sin = angle.deg2rad().cos() / scale, angle.deg2rad().sin() / scale
    # where the pixels of the result come from, counted from the middle of the image
    x = torch.arange(width, device=images.device) - (width - 1) / 2 - right * width
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2 - down * height
    grid = torch.stack([(cos * x + sin * y) / (width / 2), (cos * y - sin * x) / (height / 2)], dim=-1)
    seen = F.grid_sample(images.float(), grid, align_corners=False)
    seen = (seen * brightness[:, None]).clamp(0, 255)
    seen = torch.lerp(_grey(seen).mean((-2, -1), keepdim=True), seen, contrast[:, None]).clamp(0, 255)
    seen = torch.lerp(_grey(seen), seen, saturation[:, None]).clamp(0, 255)
    return seen.round().byte()


def _grey(images: Tensor) -> Tensor:
    """The luma of f32[P 3 H W], f32[P 1 H W] (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
