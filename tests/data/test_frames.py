from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from pi05_lightning.data import frame_cache
from pi05_lightning.data.errors import BadImage, BadSample
from pi05_lightning.data.frames import VideoDecoder, VideoFrames
from pi05_lightning.data.images import read_image, resize_image
from pi05_lightning.data.labels import Labels
from pi05_lightning.data.lerobot_files import LeRobotFiles, read_episodes
from pi05_lightning.data.open_files import OpenFiles
from pi05_lightning.data.sources import lerobot_images
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.types import Shapes

from .test_bad_data import replace_image

NATIVE = 64  # of frames of 48 × 64: cached at this size they are only padded
SIZE = 32


def open_source(root: Path, image_size: int = SIZE, **options) -> LeRobotSource:
    shapes = Shapes(image_size, horizon=4, action_dim=4, vocab_size=300, fast_vocab_size=32, fast_skip_tokens=0)
    return LeRobotConfig(path=str(root), **{"val_fraction": 0, **options}).open("robot", "train", shapes)


def lerobot_frames(root: Path, key: str) -> list[np.ndarray]:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("robot", root=root, video_backend="pyav", return_uint8=True)
    frames = [dataset[index][key].numpy() for index in range(len(dataset))]
    return [frame if frame.dtype == np.uint8 else (frame * 255).round().astype(np.uint8) for frame in frames]


def cached_files(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root.parent / ".cache").rglob("chunk*")}


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_video_frames_are_lerobots_in_any_order(videos: Path, order: str) -> None:
    expected = lerobot_frames(videos, "observation.images.wrist")
    indices = np.arange(len(expected))
    indices = {
        "forwards": indices,
        "backwards": indices[::-1],
        "shuffled": np.random.default_rng(0).permutation(indices),
    }[order]
    source = open_source(videos)
    for index in indices:
        np.testing.assert_array_equal(source[int(index)].images["wrist"], expected[index])


def test_image_columns_are_lerobots(pictures: Path) -> None:
    expected = lerobot_frames(pictures, "observation.images.top")
    source = open_source(pictures)
    for index in np.random.default_rng(0).permutation(len(expected)):
        np.testing.assert_array_equal(source[int(index)].images["top"], expected[index])


@pytest.mark.parametrize("kind", ["videos", "pictures"])
@pytest.mark.parametrize("size", [NATIVE, SIZE])
def test_cached_frames_are_the_resized_originals(kind: str, size: int, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(f"{kind}_copy")
    direct, cached = open_source(root), open_source(root, size, image_cache=True)
    cached.prepare()
    for index in range(len(direct)):
        image = resize_image(direct[index].images["top"], (size, size))
        np.testing.assert_array_equal(cached[index].images["top"], image)


def test_frames_of_chosen_episodes_are_the_same_from_the_cache(videos_copy: Path) -> None:
    direct, cached = (open_source(videos_copy, NATIVE, episodes=[1, 3], image_cache=c) for c in (False, True))
    cached.prepare()
    for index in range(len(direct)):
        image = resize_image(direct[index].images["top"], (NATIVE, NATIVE))
        np.testing.assert_array_equal(cached[index].images["top"], image)


def test_images_that_are_converted_have_a_cache_of_their_own(pictures_copy: Path) -> None:
    replace_image(pictures_copy, 5, Image.new("L", (64, 48), 100))
    options = {"image_cache": True, "on_bad_sample": "skip"}
    converted, plain = (open_source(pictures_copy, convert_images=convert, **options) for convert in (True, False))
    converted.prepare()
    plain.prepare()
    assert (len(converted), len(plain)) == (54, 53)
    assert converted[5].images["top"].max() == 100


def test_a_cache_is_written_once(videos_copy: Path) -> None:
    open_source(videos_copy, image_cache=True).prepare()
    before = cached_files(videos_copy)
    open_source(videos_copy, image_cache=True).prepare()
    assert len(before) == 4
    assert cached_files(videos_copy) == before


def test_a_changed_video_is_decoded_anew(videos_copy: Path) -> None:
    open_source(videos_copy, image_cache=True).prepare()
    before = set(cached_files(videos_copy))
    os.utime(next((videos_copy / "videos").rglob("*.mp4")))
    source = open_source(videos_copy, image_cache=True)
    with pytest.raises(RuntimeError, match="prepare"):
        source[0]
    source.prepare()
    after = set(cached_files(videos_copy))
    assert len(after) == 4
    assert len(after & before) == 2
    assert source[0].images["top"].shape == (3, SIZE, SIZE)


def test_a_cache_with_fewer_frames_than_its_index_says_is_decoded_anew(videos_copy: Path) -> None:
    open_source(videos_copy, image_cache=True).prepare()
    pixels = next((videos_copy.parent / ".cache").rglob("*.u8"))
    os.truncate(pixels, pixels.stat().st_size // 2)
    direct, cached = open_source(videos_copy), open_source(videos_copy, image_cache=True)
    cached.prepare()
    for camera, image in direct[len(direct) - 1].images.items():
        np.testing.assert_array_equal(cached[len(direct) - 1].images[camera], resize_image(image, (SIZE, SIZE)))


def test_what_another_machine_writes_to_a_shared_cache_stays(videos_copy: Path) -> None:
    open_source(videos_copy, image_cache=True).prepare()
    pixels = next((videos_copy.parent / ".cache").rglob("*.u8"))
    others = pixels.with_suffix(".u8.elsewhere.tmp")
    others.write_bytes(b"half")
    pixels.unlink()
    open_source(videos_copy, image_cache=True).prepare()
    assert pixels.exists()
    assert others.read_bytes() == b"half"


def test_machines_whose_copies_of_a_dataset_have_other_dates_keep_their_caches(
    videos_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next((videos_copy / "videos").rglob("*.mp4"))

    def cached_by(host: str, date: int) -> set[str]:
        monkeypatch.setattr(frame_cache, "HOST", host)
        os.utime(file, (date, date))
        open_source(videos_copy, image_cache=True).prepare()
        return set(cached_files(videos_copy))

    first = cached_by("first", 1)
    both = cached_by("second", 2)
    assert first < both
    assert cached_by("first", 1) == both
    own = cached_by("second", 3)
    assert first < own
    assert len(own) == len(both)  # its file changed: what it had is left over
    for path in (videos_copy.parent / ".cache").rglob("chunk*"):
        os.utime(path, (0, 0))  # long unused
    assert not first <= cached_by("second", 4)


def test_what_another_machine_has_just_cached_is_not_removed(
    videos_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source(videos_copy, image_cache=True).prepare()
    before = cached_files(videos_copy)
    cache = open_source(videos_copy, image_cache=True)._images.caches["top"]
    monkeypatch.setattr(cache, "_is_cached", lambda file: False)  # as it was a moment before
    stop = threading.Event()

    def scan(file: int) -> Iterator[tuple[float, np.ndarray]]:
        stop.set()
        yield from VideoFrames.scan(cache.origin, file)

    monkeypatch.setattr(cache.origin, "scan", scan)
    cache.decode(0, tqdm(disable=True), stop)
    assert before.items() <= cached_files(videos_copy).items()


def test_caches_are_locked_in_one_order(videos_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[str] = []
    monkeypatch.setattr(frame_cache, "FileLock", lambda path: locked.append(str(path)) or nullcontext())
    caches = list(open_source(videos_copy, image_cache=True)._images.caches.values())
    for order in (caches, caches[::-1]):
        frame_cache.fill(order, "robot")
    assert len(caches) == 2
    assert locked == sorted(locked[:2]) * 2


def test_sizes_are_cached_side_by_side(videos_copy: Path) -> None:
    sources = [open_source(videos_copy, size, image_cache=True) for size in (SIZE, NATIVE)]
    for source in sources:
        source.prepare()
    assert [source[0].images["top"].shape[-1] for source in sources] == [SIZE, NATIVE]


def test_frames_are_cached_where_cache_dir_says(videos_copy: Path, tmp_path: Path) -> None:
    source = open_source(videos_copy, image_cache=True, cache_dir=str(tmp_path / "cache"))
    source.prepare()
    assert source[0].images["top"].shape == (3, SIZE, SIZE)
    assert not cached_files(videos_copy)


def test_frames_are_in_the_users_cache_where_nothing_can_be_written_beside_the_dataset(
    videos_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / ".cache").mkdir()  # another user's
    monkeypatch.setattr(os, "access", lambda path, *_, **__: path != tmp_path / ".cache")
    open_source(videos_copy, image_cache=True).prepare()
    assert not cached_files(videos_copy)
    assert len(list((tmp_path / "user" / "pi05").rglob("*.u8"))) == 2


def test_a_dataset_in_anothers_place_is_read_from_its_own_frames(videos_copy: Path) -> None:
    first = open_source(videos_copy, image_cache=True)
    first.prepare()
    expected = first[5].images
    other = Path(shutil.copytree(videos_copy, videos_copy.with_name("other")))
    video(other, "top").write_bytes(video(videos_copy, "wrist").read_bytes())
    moved = videos_copy.rename(videos_copy.with_name("moved"))
    other.rename(videos_copy)
    for root, camera in ((videos_copy, "wrist"), (moved, "top")):
        source = open_source(root, image_cache=True)
        source.prepare()
        np.testing.assert_array_equal(source[5].images["top"], expected[camera])


@pytest.mark.slow
def test_a_killed_decode_leaves_no_half_written_cache(videos_copy: Path) -> None:
    code = f"""
import os
from pi05_lightning.data.frame_cache import CachedFrames
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.types import Shapes

def write_and_die(self, batch, out):
    out.write(bytes(100_000))
    out.flush()
    os.kill(os.getpid(), 9)

CachedFrames._write = write_and_die
config = LeRobotConfig({str(videos_copy)!r}, val_fraction=0, image_cache=True)
config.open("robot", "train", Shapes({SIZE}, 4, 4, 300, 32, 0)).prepare()
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(name.endswith(".tmp") for name in cached_files(videos_copy))
    direct, cached = open_source(videos_copy), open_source(videos_copy, image_cache=True)
    cached.prepare()
    np.testing.assert_array_equal(cached[0].images["top"], resize_image(direct[0].images["top"], (SIZE, SIZE)))
    assert not any(name.endswith(".tmp") for name in cached_files(videos_copy))


def test_a_cache_that_does_not_fit_on_the_disk_is_refused(videos_copy: Path) -> None:
    source = open_source(videos_copy, 200_000, image_cache=True)
    with pytest.raises(OSError, match=r"takes 12960.0 GB.*cache_dir"):
        source.prepare()


# --- bad data


def video(root: Path, camera: str = "top") -> Path:
    return next((root / "videos" / f"observation.images.{camera}").rglob("*.mp4"))


def cut(path: Path, share: float) -> None:
    """Keep the header, lose the last frames' bytes, as an interrupted copy does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_a_missing_video_is_found_on_opening(videos_copy: Path) -> None:
    video(videos_copy).unlink()
    with pytest.raises(
        BadSample, match=r"dataset 'robot', episode 0, frame 0, observation.images.top: .*mp4 is missing"
    ):
        open_source(videos_copy)


def test_skipping_a_missing_video_leaves_out_its_frames_only(videos_copy: Path) -> None:
    video(videos_copy).unlink()
    with pytest.raises(ValueError, match="no usable frame"):
        open_source(videos_copy, on_bad_sample="skip")
    only_wrist = {"observation.images.wrist": "wrist"}
    assert len(open_source(videos_copy, on_bad_sample="skip", cameras=only_wrist)) == 54


def test_a_truncated_video_is_an_error_at_the_first_frame_it_lacks(videos_copy: Path) -> None:
    cut(video(videos_copy), 0.7)
    source = open_source(videos_copy)
    source[0]
    with pytest.raises(BadSample, match=r"dataset 'robot', episode 4, frame 10, top: .*file-000\.mp4"):
        source[len(source) - 1]


def test_caching_a_truncated_video_is_an_error_with_the_address(videos_copy: Path) -> None:
    cut(video(videos_copy), 0.7)
    with pytest.raises(BadSample, match=r"dataset 'robot', episode \d, frame \d+, top: .*file-000\.mp4"):
        open_source(videos_copy, image_cache=True).prepare()


def test_a_good_frame_is_read_after_one_that_does_not_decode(videos_copy: Path) -> None:
    cut(video(videos_copy), 0.7)
    decoder = VideoDecoder(video(videos_copy))
    decoder.read(0.0, 1e-3)
    with pytest.raises(BadImage):
        decoder.read(5.2, 1e-3)
    assert decoder.read(0.1, 1e-3).shape == (3, 48, 64)


def test_skipping_keeps_the_frames_that_a_truncated_video_still_has(videos_copy: Path) -> None:
    whole = open_source(videos_copy, NATIVE)
    expected = [resize_image(whole[index].images["top"], (NATIVE, NATIVE)) for index in range(len(whole))]
    cut(video(videos_copy), 0.7)
    source = open_source(videos_copy, NATIVE, image_cache=True, on_bad_sample="skip")
    source.prepare()
    assert 0 < len(source) < len(whole)
    assert source.rejects.frames == len(whole) - len(source)
    for index in range(len(source)):
        np.testing.assert_array_equal(source[index].images["top"], expected[index])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted by Linux")
def test_few_files_are_open_however_many_videos_are_read(videos_copy: Path) -> None:
    original = video(videos_copy)
    files = [original.with_name(f"{number}.mp4") for number in range(40)]
    for file in files:
        shutil.copy(original, file)
    store = VideoFrames(files, np.arange(40, dtype=np.int32), np.zeros(40), tolerance=1e-3, convert=False)
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            for row in range(40):
                store.read(row)
        assert [store.count(file) for file in range(40)] == [store.count(0)] * 40
        assert len(os.listdir("/proc/self/fd")) <= before + 32
    finally:
        gc.enable()


@contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened any more, as where too many are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # else what earlier tests left is closed meanwhile
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 1, hard))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.dup(opened[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened:
            os.close(descriptor)


TOO_MANY = "too many files are open: use fewer workers"


def test_what_is_kept_open_is_bounded_by_its_size() -> None:
    closed: list[int] = []
    opened = OpenFiles(bytes, capacity=10, close=lambda content: closed.append(len(content)), size=len)
    for size in (4, 5, 4, 6, 20):
        _ = opened[size]
    assert closed == [5, 4, 6]
    assert len(opened[20]) == 20  # more than may be kept, and kept all the same
    assert closed == [5, 4, 6]


@pytest.mark.parametrize(("image_cache", "warnings"), [(False, 1), (True, 0)])
def test_large_groups_of_rows_are_warned_of_where_images_are_read_from_them(
    pictures_copy: Path,
    image_cache: bool,
    warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lerobot_images, "LARGE_GROUP", 100)
    open_source(pictures_copy, image_cache=image_cache).prepare()
    assert caplog.text.count("set `image_cache: true`") == warnings


def test_too_many_open_files_are_no_bad_sample(videos_copy: Path) -> None:
    path = video(videos_copy)
    with no_more_files(), pytest.raises(OSError, match=TOO_MANY):
        VideoDecoder(path)


def test_too_many_open_files_are_no_damaged_image(pictures_copy: Path) -> None:
    Image.new("RGB", (4, 4)).save(pictures_copy / "image.png")
    read_image(pictures_copy / "image.png")
    source = open_source(pictures_copy, on_bad_sample="skip")
    with no_more_files():
        for read in (lambda: read_image(pictures_copy / "image.png"), lambda: source[0]):
            with pytest.raises(OSError, match=TOO_MANY):
                read()
    assert source[0].images["top"].shape == (3, 48, 64)


def test_too_many_open_files_are_no_damaged_dataset(pictures: Path) -> None:
    files = LeRobotFiles.open(pictures)
    for read in (
        lambda: read_episodes(pictures / "meta/episodes/chunk-000/file-000.parquet"),
        lambda: files.sentences("tasks", "task"),
        lambda: Labels.read(pictures / "meta/tasks.parquet", files),
    ):
        with no_more_files(), pytest.raises(OSError, match=TOO_MANY):
            read()


def test_too_many_open_files_are_no_damaged_file_to_the_cache(pictures_copy: Path) -> None:
    source = open_source(pictures_copy, on_bad_sample="skip", image_cache=True)
    store = source._images.caches["top"].origin
    with no_more_files(), pytest.raises(OSError, match=TOO_MANY):
        next(store.scan(0))
    source.prepare()
    with no_more_files(), pytest.raises(OSError, match=TOO_MANY):
        source._images.caches["top"]._map(0)
    assert len(source) == 54


def test_as_many_files_may_be_open_as_the_system_allows(pictures: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        open_source(pictures)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_a_file_that_is_no_video_is_named(videos_copy: Path, content: bytes) -> None:
    video(videos_copy).write_bytes(content)
    named = r"episode 0, frame 0, observation.images.top: .*file-000\.mp4 cannot be opened as a video"
    with pytest.raises(BadSample, match=named):
        open_source(videos_copy)


def test_a_timestamp_between_frames_is_an_error(videos_copy: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = videos_copy / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("timestamp")
    shifted = pa.array(np.asarray(table["timestamp"]) + np.float32(0.03))
    pq.write_table(table.set_column(at, "timestamp", shifted), path)
    with pytest.raises(BadSample, match=r"has no frame at 0\.1300 s ± 0\.0001"):
        open_source(videos_copy)[1]
