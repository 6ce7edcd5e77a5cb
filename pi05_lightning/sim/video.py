"""Films of episodes: the cameras side by side, with the subtask and the outcome written under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAMERA_HEIGHT = 256  # pixels that a camera image is scaled to
CAPTION_HEIGHT = 48
_COLOURS = {True: "#1a7f37", False: "#57606a"}


class Episode(Protocol):
    """What a film shows: u8[h w 3] images and a caption per decision, and whether it ended well."""

    success: bool
    images: list[np.ndarray]
    captions: list[str]

    @property
    def title(self) -> str: ...


def frames(episode: Episode) -> list[np.ndarray]:
    """The film's frames u8[H W 3]; the last one carries the outcome."""
    last = len(episode.images) - 1
    return [
        _captioned(
            image,
            [episode.title + ("  success" if episode.success and i == last else ""), caption],
            _COLOURS[episode.success and i == last],
        )
        for i, (image, caption) in enumerate(zip(episode.images, episode.captions, strict=True))
    ]


def write(path: Path, episode: Episode, fps: int) -> None:
    """An mp4 that browsers play (H.264, 4:2:0), its last frame held for a second, and a PNG of its middle frame."""
    shown = frames(episode)
    Image.fromarray(shown[len(shown) // 2]).save(path.with_suffix(".png"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", fps)
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in [*shown, *[shown[-1]] * fps]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _captioned(image: np.ndarray, lines: Sequence[str], colour: str) -> np.ndarray:
    scale = CAMERA_HEIGHT / image.shape[0]
    picture = Image.fromarray(image).resize((round(image.shape[1] * scale), CAMERA_HEIGHT), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (picture.width, CAMERA_HEIGHT + CAPTION_HEIGHT), colour)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((8, CAMERA_HEIGHT + 4 + 20 * number), line, fill="white", font=ImageFont.load_default(15))
    return np.asarray(canvas)
