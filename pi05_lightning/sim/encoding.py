"""Encodes what a dataset's cameras saw."""

from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

SETTINGS: dict[str, str | int] = {"vcodec": "h264", "pix_fmt": "yuv444p", "g": 2, "crf": 12, "preset": "veryfast"}
"""In LeRobot's names. Full chroma and little loss, because at 64 px an object is a few pixels; a key frame every
second frame, as LeRobot has it, for random access."""


def encode_video(path: Path, images: np.ndarray, fps: int) -> None:
    """Write images uint8[N h w 3] as an MP4 with `SETTINGS`; makes the folders above it."""
    logging.getLogger("libav").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {name: str(SETTINGS[name]) for name in ("g", "crf", "preset")} | {"threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(str(SETTINGS["vcodec"]), fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = str(SETTINGS["pix_fmt"])
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
