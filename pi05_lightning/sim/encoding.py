"""Encodes films: what a dataset's cameras saw, and what an episode looked like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream

SETTINGS: dict[str, Any] = {"vcodec": "h264", "pix_fmt": "yuv444p", "g": 2, "crf": 12, "preset": "veryfast"}
"""Of datasets, in LeRobot's names. Full chroma and little loss, because at 64 px an object is a few pixels; a key frame
every second frame, as LeRobot has it, for random access."""


def encode_video(
    path: Path,
    images: Sequence[np.ndarray] | np.ndarray,
    fps: int | Fraction,
    vcodec: str,
    pix_fmt: str,
    **options: Any,
) -> None:
    """Write images uint8[N h w 3] as an MP4; options are the codec's. Makes the folders above it."""
    logging.getLogger("libav").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path.absolute()), "w") as container:
        stream = container.add_stream(vcodec, fps, options={name: str(value) for name, value in options.items()})
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
