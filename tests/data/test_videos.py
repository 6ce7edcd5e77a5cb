"""Videos as encoders write them: whatever the order of reading, a frame is what it is when all are read in order."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pi05_lightning.data.errors import BadImage
from pi05_lightning.data.frames import VideoDecoder

RATE = 30
CASES = {
    "HEVC, open GOP of 3": ("a.mp4", "libx265", {"x265-params": "open-gop=1:keyint=3:min-keyint=1:bframes=2"}),
    "HEVC, open GOP of 30": ("a.mp4", "libx265", {"x265-params": "open-gop=1:keyint=30:bframes=4"}),
    "H.264, open GOP of 12": ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "H.264, open GOP of 4": ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=4:min-keyint=1:bframes=3"}),
    "H.264, refreshed in columns": ("a.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "H.264, one key frame": ("a.mp4", "libx264", {"g": "1000", "bf": "3"}),
    "H.264 in Matroska": ("a.mkv", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "H.264 in a transport stream": ("a.ts", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "AV1 as LeRobot": ("a.mp4", "libsvtav1", {"g": "2", "preset": "10"}),
    "AV1, forward key frames": ("a.mp4", "libsvtav1", {"preset": "10", "svtav1-params": "irefresh-type=1:keyint=16"}),
    "VP9": ("a.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "lag-in-frames": "10"}),
    "MPEG-2": ("a.mp4", "mpeg2video", {"g": "12", "bf": "2"}),
    "MPEG-4": ("a.mp4", "mpeg4", {"g": "12", "bf": "2"}),
}


def encode(path: Path, codec: str, options: dict, first: int = 0, container: dict | None = None) -> None:
    """101 frames of a moving texture, the first shown at that many frames."""
    texture = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.options = 96, 64, "yuv420p", options
        for number in range(101):
            image = np.roll(texture, 2 * number, axis=1)
            image[10:30, 3 * number % 70 : 3 * number % 70 + 20] = (number, 255 - number, 128)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def read_in_any_order(path: Path, orders: int = 2) -> np.ndarray:
    """The times of all frames, after every frame was read in random orders and compared."""
    in_order = list(VideoDecoder(path).scan())
    decoder = VideoDecoder(path)
    for seed in range(orders):
        for index in np.random.default_rng(seed).permutation(len(in_order)):
            time, expected = in_order[index]
            np.testing.assert_array_equal(decoder.read(time, 1e-4), expected)
    return np.array([time for time, _ in in_order])


@pytest.mark.parametrize("case", CASES)
def test_a_frame_is_the_same_in_any_order(tmp_path: Path, case: str) -> None:
    name, codec, options = CASES[case]
    encode(tmp_path / name, codec, options)
    assert len(read_in_any_order(tmp_path / name)) == 101


@pytest.mark.parametrize("container", [{}, {"use_editlist": "0"}, {"movflags": "frag_keyframe+empty_moov"}], ids=str)
@pytest.mark.parametrize("first", [0, 50, -7])
def test_a_video_may_begin_at_any_time(tmp_path: Path, first: int, container: dict) -> None:
    encode(tmp_path / "a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}, first, container)
    times = read_in_any_order(tmp_path / "a.mp4", orders=1)
    np.testing.assert_allclose(np.diff(times), 1 / RATE, atol=1e-3)


@pytest.mark.parametrize("case", ["H.264, open GOP of 12", "H.264 in a transport stream", "AV1 as LeRobot"])
@pytest.mark.parametrize("time", [-5.0, 0.05, 60.0])
def test_a_time_without_a_frame_is_refused_in_finite_time(tmp_path: Path, case: str, time: float) -> None:
    name, codec, options = CASES[case]
    encode(tmp_path / name, codec, options)
    decoder = VideoDecoder(tmp_path / name)
    with pytest.raises(BadImage, match="has no frame at"):
        decoder.read(time, 1e-4)
    in_order = list(VideoDecoder(tmp_path / name).scan())
    np.testing.assert_array_equal(decoder.read(in_order[40][0], 1e-4), in_order[40][1])


def test_with_a_wide_tolerance_the_frame_is_the_nearest_and_the_next_one_is_still_read(tmp_path: Path) -> None:
    name, codec, options = CASES["H.264, one key frame"]
    encode(tmp_path / name, codec, options)
    frames = [image for _, image in VideoDecoder(tmp_path / name).scan()]
    decoder = VideoDecoder(tmp_path / name)
    for index in (*range(1, 20), 70, 40):
        for off in (-0.3, 0.3):
            found = decoder.read((index + off) / RATE, 0.9 / RATE)
            np.testing.assert_array_equal(found, frames[index])


COLOURS = np.array([(40, 180, 60), (200, 40, 40), (30, 60, 200), (220, 200, 40), (128, 128, 128), (250, 250, 250)])
KR_KB = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722), "BT.2020": (0.2627, 0.0593)}
UNSPECIFIED = 2  # of colour spaces; of ranges it is 0
LIMITED, FULL = 1, 2


def encode_colours(path: Path, codec: str, matrix: str, space: int, is_full: bool) -> None:
    """A row of colours, made YUV by a matrix, whatever is said of it."""
    red, green, blue = np.repeat(np.repeat(COLOURS[None], 64, axis=0), 32, axis=1).transpose(2, 0, 1) / 255
    kr, kb = KR_KB[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (1 - kb) / 2, (red - luma) / (1 - kr) / 2]
    low, span, chroma_span = (0, 255, 255) if is_full else (16, 219, 224)
    planes = [low + span * luma, *(128 + chroma_span * plane[::2, ::2] for plane in chroma)]
    yuv = np.concatenate([plane.ravel() for plane in planes]).round().clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.options = 32 * len(COLOURS), 64, "yuv420p", {"crf": "1"}
        frame = av.VideoFrame.from_ndarray(yuv.reshape(96, -1), "yuv420p")
        for tagged in (stream.codec_context, frame):
            tagged.colorspace, tagged.color_range = space, FULL if is_full else LIMITED
        frame.pts, frame.time_base = 0, Fraction(1, RATE)
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.mark.parametrize(
    ("codec", "matrix", "space", "is_full"),
    [
        ("libx264", "BT.601", UNSPECIFIED, False),
        ("libx264", "BT.601", 6, False),
        ("libx264", "BT.709", 1, False),
        ("libx264", "BT.709", 1, True),
        ("libx264", "BT.2020", 9, False),
        ("libvpx-vp9", "BT.709", 1, True),
        ("libvpx-vp9", "BT.601", 6, True),
        ("libsvtav1", "BT.709", 1, False),
    ],
)
def test_colours_are_what_the_video_says_they_are(
    tmp_path: Path, codec: str, matrix: str, space: int, is_full: bool
) -> None:
    encode_colours(tmp_path / "a.mp4", codec, matrix, space, is_full)
    found = VideoDecoder(tmp_path / "a.mp4").read(0.0, 1e-3).transpose(1, 2, 0)
    np.testing.assert_allclose(found[32, 16::32].astype(int), COLOURS, atol=4)


def test_a_format_that_cannot_be_made_rgb_is_a_bad_image(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.nut"), "w") as file:
        stream = file.add_stream("rawvideo", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb4"
        file.mux(stream.encode(av.VideoFrame(64, 48, "rgb4")))
    with pytest.raises(BadImage, match="holds rgb4"):
        VideoDecoder(tmp_path / "a.nut").read(0.0, 1e-3)
