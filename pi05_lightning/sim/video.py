"""Films of episodes: the cameras side by side, the subtask, the chunk that is being executed, and how it ended."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pi05_lightning.sim.encoding import encode_video
from pi05_lightning.sim.trials import FilmFrame, Result

CAMERA_HEIGHT = 256  # pixels that a camera image is scaled to
CAPTION_HEIGHT = 48
CHUNK_HEIGHT = 64
GIF_FPS = 50  # more are shown slower than they say
MAX_CURVES = 8  # action dimensions that are drawn
_COLOURS = {True: "#1a7f37", False: "#57606a"}
_CURVES = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2", "#FFFFFF")
Bounds = tuple[np.ndarray, np.ndarray]
"""The lowest and the highest of each action dim in an episode's chunks, f32[A]."""


def frames(result: Result) -> list[np.ndarray]:
    """The film's frames u8[H W 3], H and W even."""
    chunks = [frame.chunk for frame in result.film if frame.chunk is not None]
    bounds = (np.min([c.min(0) for c in chunks], 0), np.max([c.max(0) for c in chunks], 0)) if chunks else None
    last = len(result.film) - 1
    return [_frame(result, frame, bounds, over=i == last) for i, frame in enumerate(result.film)]


def write(path: Path, result: Result) -> None:
    """An mp4 that browsers play (H.264, 4:2:0), its last frame held for a second, and a PNG of its middle frame.

    It plays as fast as the episode went in simulated time.
    """
    shown, fps = frames(result), Fraction(result.fps / result.film_every).limit_denominator(1000)
    Image.fromarray(shown[len(shown) // 2]).save(path.with_suffix(".png"))
    encode_video(path, [*shown, *[shown[-1]] * max(1, round(fps))], fps, "libx264", "yuv420p")


def gif(result: Result) -> bytes:
    """The same as an animated GIF that goes on for ever: what TensorBoard plays; of fast episodes some frames alone."""
    every = math.ceil(result.fps / GIF_FPS)
    first, *rest = [Image.fromarray(image).quantize(64) for image in frames(result)[::-every][::-1]]  # with the last
    buffer = io.BytesIO()
    durations = [round(1000 * every / result.fps)] * len(rest) + [1000]
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return buffer.getvalue()


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Pillow's own font knows no letter beyond ASCII."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 14)


def _frame(result: Result, shown: FilmFrame, bounds: Bounds | None, over: bool) -> np.ndarray:
    scale = CAMERA_HEIGHT / shown.image.shape[0]
    width = 2 * round(shown.image.shape[1] * scale / 2)
    picture = Image.fromarray(shown.image).resize((width, CAMERA_HEIGHT), Image.Resampling.BICUBIC)
    height = CAMERA_HEIGHT + CAPTION_HEIGHT + (CHUNK_HEIGHT if bounds else 0)
    canvas = Image.new("RGB", (width, height), _COLOURS[over and result.success])
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    title = f"{result.trial.title}  {result.outcome}".rstrip() if over else result.trial.title
    for number, line in enumerate((title, shown.caption)):
        draw.text((8, CAMERA_HEIGHT + 4 + 20 * number), line, fill="white", font=_font())
    if bounds is not None and shown.chunk is not None:
        _draw_chunk(draw, shown.chunk, shown.place, bounds, top=CAMERA_HEIGHT + CAPTION_HEIGHT, width=width)
    return np.asarray(canvas)


def _draw_chunk(draw: ImageDraw.ImageDraw, chunk: np.ndarray, place: int, bounds: Bounds, top: int, width: int) -> None:
    """One curve per action dimension over the chunk's steps, scaled to the episode's range; a line where we are."""
    low, high = bounds
    draw.rectangle((0, top, width, top + CHUNK_HEIGHT), fill="#24292f")
    x = 8 + (width - 16) * (np.arange(len(chunk)) + 0.5) / len(chunk)
    share = (chunk - low) / np.maximum(high - low, 1e-6)
    y = top + 6 + (CHUNK_HEIGHT - 12) * (1 - share)
    draw.line((x[place], top, x[place], top + CHUNK_HEIGHT), fill="white")
    for dim in range(min(chunk.shape[1], MAX_CURVES)):
        points = list(zip(x.tolist(), y[:, dim].tolist(), strict=True))
        draw.line(points, fill=_CURVES[dim], width=2)
        for px, py in points:
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), fill=_CURVES[dim])
