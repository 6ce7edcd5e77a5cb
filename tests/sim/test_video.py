"""Films: the subtask, the chunk and the outcome are drawn into the frames."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from pi05_lightning.sim import video
from pi05_lightning.sim.trials import FilmFrame, Result, Trial

CHUNK = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)


def episode(
    success: bool = True, caption: str = "open it", chunk: np.ndarray | None = CHUNK, fps: float = 10, length: int = 3
) -> Result:
    film = [FilmFrame(np.full((32, 63, 3), 9, np.uint8), caption, chunk, place % 4) for place in range(length)]
    reason = "" if success else "out of time"
    return Result(Trial("policy", "walk", 0), success=success, reason=reason, fps=fps, film=film)


def test_caption_and_chunk_are_drawn():
    plain = video.frames(episode())[0]
    assert not np.array_equal(plain, video.frames(episode(caption="close it"))[0])
    assert not np.array_equal(plain, video.frames(episode(chunk=CHUNK[::-1]))[0])


def test_letters_of_other_scripts_are_drawn():
    first, second = (video.frames(episode(caption=caption))[0] for caption in ("öffne", "äffne"))
    assert not np.array_equal(first, second)


def test_line_moves_along_the_chunk():
    first, second, _ = video.frames(episode())
    changed = (first != second).any(2)
    assert changed[: video.CAMERA_HEIGHT + video.CAPTION_HEIGHT].sum() == 0
    assert changed.sum() > 0


def test_last_frame_says_how_it_ended():
    won, lost = video.frames(episode(True)), video.frames(episode(False))
    np.testing.assert_array_equal(won[0], lost[0])
    assert not np.array_equal(won[-1], lost[-1])
    assert won[-1][video.CAMERA_HEIGHT + 1, 1].tolist() == [0x1A, 0x7F, 0x37]


def test_baseline_has_no_chunk_to_draw():
    assert video.frames(episode(chunk=None))[0].shape[0] == video.CAMERA_HEIGHT + video.CAPTION_HEIGHT


def test_film_plays_in_browsers_and_holds_its_last_frame(tmp_path):
    video.write(tmp_path / "film.mp4", episode(fps=5))
    with av.open(str(tmp_path / "film.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert sum(1 for _ in film.decode(video=0)) == 3 + 5
    assert Image.open(tmp_path / "film.png").height == 368


@pytest.mark.parametrize("fps", [12.5, 80.0, 0.5])
def test_films_take_the_time_that_the_episode_took(tmp_path, fps):
    video.write(tmp_path / "film.mp4", episode(fps=fps, length=9))
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert float(film.streams.video[0].average_rate) == pytest.approx(fps)
    with Image.open(io.BytesIO(video.gif(episode(fps=fps, length=9)))) as film:
        times = []
        for frame in range(film.n_frames - 1):
            film.seek(frame)
            times.append(film.info["duration"])
    assert min(times) >= 20
    assert sum(times) == pytest.approx(8000 / fps, rel=0.25)  # GIF counts in hundredths of a second


def test_gif_has_every_frame_and_goes_on_for_ever():
    with Image.open(io.BytesIO(video.gif(episode(fps=5)))) as film:
        assert film.n_frames == 3
        assert film.info["loop"] == 0
