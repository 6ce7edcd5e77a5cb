"""Frames decoded once, at the model's size: a training read becomes a copy out of memory-mapped bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from pi05_lightning.data.columns import runs_of
from pi05_lightning.data.errors import BadImage
from pi05_lightning.data.frames import FrameStore
from pi05_lightning.data.images import resize_with_pad
from pi05_lightning.data.open_files import OpenFiles, check_open_files
from pi05_lightning.files.cores import available_cores

_VERSION = 4  # part of every fingerprint: raise it when the same file would give other bytes
HOST = socket.gethostname()
TEMPORARY = f".{HOST}.tmp"  # locks may be a machine's own where the folder is not
DAY = 86_400  # seconds after which another machine's is left over too
UNUSED_DAYS = 30  # the same for frames that it decoded: its copy of a dataset may have other dates
_BATCH = 16  # frames resized and written at once; few, so that they stay in the processor's cache


def cache_folder(dataset: Path, cache_dir: Path | None) -> Path:
    """Where a dataset's frames are cached: beside its folder, or in the user's cache where that cannot be written.

    Not in it: LeRobot pushes all that is there, and the Hub refuses a `.cache`. `cache_dir` replaces both.
    """
    dataset = dataset.resolve()
    beside = dataset.parent / ".cache" / "pi05" / dataset.name
    there = next(place for place in (beside, *beside.parents) if place.exists())
    if cache_dir is None and os.access(there, os.W_OK):
        return beside
    base = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pi05"
    return base / f"{dataset.name}-{hashlib.blake2b(str(dataset).encode(), digest_size=6).hexdigest()}"


def fill(caches: Sequence[CachedFrames], label: str) -> None:
    """Decode whatever these caches lack, their files in parallel, under a progress bar called `label`.

    Raises OSError when the disk has no room for it.
    """
    with ExitStack() as locks:
        for cache in sorted(caches, key=lambda cache: cache.folder):  # whoever locks several does so in one order
            cache.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(cache.folder / ".lock"))
            for leftover in cache.folder.glob("*.tmp"):
                if leftover.name.endswith(TEMPORARY) or time.time() - leftover.stat().st_mtime > DAY:
                    leftover.unlink(missing_ok=True)
        missing = [(cache, file) for cache in caches for file in cache.missing()]
        if missing:
            _decode_all(missing, label)


class CachedFrames:
    """The frames of a store at one size, in file order: per file its pixels (`.u8`), positions and old sizes (`.npz`).

    `fill` writes what is missing, each file atomically; one whose size or date changed, or those of an image that it
    names, is decoded anew.
    """

    def __init__(self, origin: FrameStore, size: tuple[int, int], folder: Path):
        self.origin, self.size = origin, size
        self.folder = folder / f"{size[0]}x{size[1]}{'-converted' if origin.convert else ''}"
        self._place: np.ndarray | None = None
        self._sizes: dict[int, np.ndarray] = {}
        self._problem: dict[int, str] = {}
        self._pixels = OpenFiles(self._map, capacity=256)

    def missing(self) -> list[int]:
        """The files, by number, that exist and are not cached."""
        return [i for i in self._present if not self._is_cached(i)]

    def _is_cached(self, file: int) -> bool:
        """Whether a file's index is there, and as many frames as it says."""
        index, frames = self._index_path(file), self._frames_path(file)
        if not (index.exists() and frames.exists()):
            return False
        with np.load(index) as known:
            return frames.stat().st_size == len(known["position"]) * 3 * self.size[0] * self.size[1]

    def read(self, row: int) -> np.ndarray:
        """Image of frame `row`, u8[3 H W]; raises BadImage, or RuntimeError before `fill`."""
        place = self._places()[row]
        if place < 0:
            raise BadImage(self.problem(row))
        return np.array(self._pixels[int(self.origin.file[row])][place])

    def picture_size(self, row: int) -> tuple[int, int]:
        """Height and width of frame `row` before it was resized; it must be readable."""
        height, width = self._sizes[int(self.origin.file[row])][self._places()[row]]
        return int(height), int(width)

    def unreadable(self) -> np.ndarray:
        """bool[N]: the frames that have no readable image; RuntimeError before `fill`."""
        return self._places() < 0

    def problem(self, row: int) -> str:
        """Why frame `row` has no image."""
        file, position = int(self.origin.file[row]), self.origin.position[row]
        return self._problem.get(file) or f"{self.origin.files[file]} has no image at {position:.4f}"

    def _places(self) -> np.ndarray:
        """i64[N], each frame's place in its cached file, -1 where the file has no image for it."""
        if self._place is None:
            if self.missing():
                raise RuntimeError(f"the frame cache {self.folder} is incomplete: call prepare() on the source first")
            self._place = np.full(len(self.origin.file), -1, dtype=np.int64)
            begins, lengths = runs_of(self.origin.file)  # of a file: all rows are looked through once, not for each
            for file in self._present:
                with np.load(self._index_path(file)) as index:
                    cached, self._problem[file] = index["position"], str(index["problem"])
                    self._sizes[file] = index["size"]
                for run in np.flatnonzero(self.origin.file[begins] == file):
                    rows = slice(begins[run], begins[run] + lengths[run])
                    self._place[rows] = _nearest(cached, self.origin.position[rows], self.origin.tolerance)
        return self._place

    @property
    def _present(self) -> list[int]:
        return [i for i, path in enumerate(self.origin.files) if path.exists()]

    def _map(self, file: int) -> np.ndarray:
        path = self._frames_path(file)
        try:
            return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 3, *self.size)
        except OSError as error:
            check_open_files(error, path)
            raise

    def _stem(self, file: int) -> str:
        return "-".join(self.origin.files[file].with_suffix("").parts[-2:])

    def _frames_path(self, file: int) -> Path:
        return self._index_path(file).with_suffix(".u8")

    def _index_path(self, file: int) -> Path:
        key = f"{_VERSION} {self.origin.convert} {self.origin.files[file].name} {self.origin.version(file)}"
        fingerprint = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        return self.folder / f"{self._stem(file)}.{fingerprint}.npz"

    def decode(self, file: int, bar: tqdm, stop: threading.Event) -> None:
        """Write one file's frames, advancing the bar; stops early, leaving nothing in the cache, when told to."""
        if stop.is_set() or self._is_cached(file):  # by another machine, since it was looked for
            return
        self._place = None
        current = self._frames_path(file), self._index_path(file)  # another machine may just have written them
        others = [other for other in self.folder.glob(f"{escape(self._stem(file))}.*") if other not in current]
        for stale in [other for other in others if other.suffix != ".tmp" and _is_left_over(other)]:
            stale.unlink(missing_ok=True)
        positions: list[float] = []
        sizes: list[tuple[int, ...]] = []
        problem = ""
        batch: list[np.ndarray] = []
        pixels = self._frames_path(file).with_suffix(f".u8{TEMPORARY}")
        with pixels.open("wb") as out:
            for position, image in self.origin.scan(file):
                if stop.is_set():
                    return
                if isinstance(image, BadImage):
                    problem = problem or str(image)
                    continue
                if batch and (len(batch) == _BATCH or image.shape != batch[0].shape):
                    self._write(batch, out)
                    batch = []
                batch.append(image)
                positions.append(position)
                sizes.append(image.shape[1:])
                bar.update()
            if batch:
                self._write(batch, out)
        index = self._index_path(file).with_suffix(f".npz{TEMPORARY}")
        with index.open("wb") as out:
            size = np.array(sizes, dtype=np.int32).reshape(-1, 2)
            np.savez(out, position=np.array(positions), size=size, problem=np.array(problem), host=np.array(HOST))
        pixels.replace(self._frames_path(file))
        index.replace(self._index_path(file))  # last: an index says that its file is cached

    def _write(self, batch: list[np.ndarray], out: BinaryIO) -> None:
        resized = resize_with_pad(torch.from_numpy(np.stack(batch)), self.size)
        out.write(resized.contiguous().numpy().data)


def _is_left_over(file: Path) -> bool:
    """Whether nobody needs a file of another version's frames: this machine's, or those long unused."""
    index = file.with_suffix(".npz")
    try:
        times = index.stat()
        with np.load(index) as known:
            host = str(known["host"]) if "host" in known else HOST
    except (OSError, ValueError, BadZipFile):  # it is gone, damaged, or about to come
        with suppress(FileNotFoundError):
            return time.time() - file.stat().st_mtime > DAY
        return False
    with suppress(OSError):  # another user's
        os.utime(index, ns=(times.st_atime_ns, times.st_mtime_ns))  # to look at it is not to use it
    return host == HOST or time.time() - max(times.st_atime, times.st_mtime) > UNUSED_DAYS * DAY


def _decode_all(missing: list[tuple[CachedFrames, int]], label: str) -> None:
    counts = [(cache, cache.origin.count(file)) for cache, file in missing]
    needed = sum(count * 3 * cache.size[0] * cache.size[1] for cache, count in counts)
    folder = missing[0][0].folder
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"caching the frames of {label} takes {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left: "
            "name a larger disk as cache_dir, or decode while training with image_cache: false"
        )
    stop = threading.Event()
    # threads, since decoding, colour conversion, resizing and writing release the interpreter's lock
    with (
        tqdm(total=sum(count for _, count in counts), desc=f"decoding {label}", unit=" frames") as bar,
        ThreadPoolExecutor(min(len(missing), available_cores())) as pool,
    ):
        try:
            for future in [pool.submit(cache.decode, file, bar, stop) for cache, file in missing]:
                future.result()
        finally:
            stop.set()


def _nearest(cached: np.ndarray, wanted: np.ndarray, tolerance: float) -> np.ndarray:
    """Index of the nearest sorted `cached` value for each wanted one, -1 where none is within tolerance."""
    if not len(cached):
        return np.full(len(wanted), -1, dtype=np.int64)
    right = np.searchsorted(cached, wanted).clip(max=len(cached) - 1)
    left = (right - 1).clip(min=0)
    place = np.where(wanted - cached[left] < cached[right] - wanted, left, right)
    return np.where(np.abs(cached[place] - wanted) <= tolerance, place, -1)
