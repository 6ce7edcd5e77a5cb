"""The images of a LeRobot dataset by camera: decoded on demand from its files, or once into a cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.errors import BadImage, BadSample
from pi05_lightning.data.frame_cache import CachedFrames, fill
from pi05_lightning.data.frames import FrameStore, ParquetFrames, VideoFrames, VideoHeader
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.looks import Look
from pi05_lightning.data.sources.lerobot_rejects import Kept

LOOKED_AT = 16  # frames that tell how a camera's images look
LARGE_GROUP = 20_000_000  # bytes, from which on reading a group takes longer than decoding an image of it

log = logging.getLogger(__name__)


class Images:
    """Those of a dataset's rows; rows of which a video is absent, damaged or too short are left out of the kept ones.

    cameras: feature key → camera.  cache: the folder of cached images, and their (H, W); None decodes on demand.
    tolerance_s: how far a video frame may be from its timestamp.  convert: take images of other modes than RGB.
    """

    def __init__(
        self,
        files: LeRobotFiles,
        kept: Kept,
        cameras: Mapping[str, str],
        cache: tuple[Path, tuple[int, int]] | None,
        tolerance_s: float,
        convert: bool,
    ) -> None:
        self.files, self.kept, self.convert = files, kept, convert
        longest = kept.columns.timestamp.max(initial=0.0)
        self.tolerance_s = tolerance_s + float(np.spacing(np.float32(longest)))  # LeRobot keeps these in 32 bits
        self._stores = {camera: self._store(key, cache) for key, camera in cameras.items()}

    def _store(self, key: str, cache: tuple[Path, tuple[int, int]] | None) -> FrameStore | CachedFrames:
        columns, feature = self.kept.columns, self.files.features[key]
        if feature["dtype"] == "image":
            store: FrameStore = ParquetFrames(
                columns.files, columns.file, columns.file_row, key, self.files.root, self.convert
            )
        else:
            store = self._video(key)
        if cache is None:
            return store
        folder, size = cache
        return CachedFrames(store, size, folder / key)

    def _video(self, key: str) -> VideoFrames:
        columns, files, kept = self.kept.columns, self.files, self.kept
        place = np.searchsorted(files.column("episode_index"), columns.episode)
        start = files.video_column(key, "from_timestamp")[place]
        remedy = "Restore the video, leave its episodes out with `episodes`, or the camera with `cameras`"
        kept.reject(np.isnan(start), key, "this episode has no video of this camera", remedy)
        episodes, of_row = np.unique(place, return_inverse=True)  # pairs of numbers are slow to sort: not those of rows
        location = np.stack([files.video_column(key, name)[episodes] for name in ("chunk_index", "file_index")], axis=1)
        location = np.nan_to_num(location, nan=-1).astype(np.int64)
        numbers, of_episode = np.unique(location, axis=0, return_inverse=True)
        file = of_episode[of_row]
        paths = [files.video_path(key, *number) for number in numbers]
        position = start + columns.timestamp
        beyond = self._beyond(key, place, position) & ~np.isnan(start) & kept.mask
        if beyond.any():
            first = columns.frame[int(np.argmax(beyond))]
            shown = (
                f"its video is shorter than its rows: frame {first} would be after its end, and where frames are"
                " missing, none may be in its place"
            )
            kept.reject(np.isin(columns.episode, columns.episode[beyond]), key, shown, remedy)
        with ThreadPoolExecutor() as pool:
            headers = list(pool.map(VideoHeader.read, paths))
        latest = np.full(len(paths), -np.inf)
        np.maximum.at(latest, file, np.where(np.isnan(start), -np.inf, position))
        for i, header in enumerate(headers):
            problem = header.problem(files.fps)
            if not problem and latest[i] <= header.end + self.tolerance_s:
                continue  # else all rows are looked through for each of hundreds of files
            here = (file == i) & ~np.isnan(start)
            kept.reject(here & bool(problem), key, problem, remedy)
            late = here & (position > header.end + self.tolerance_s) & kept.mask
            if late.any():
                shown = f"{paths[i]} ends at {header.end:.4f} s, and this frame is at {position[late][0]:.4f} s of it"
                kept.reject(late, key, shown, "Correct where the episode is in meta/episodes, or restore the video")
        return VideoFrames(paths, file.astype(np.int32), position, self.tolerance_s, self.convert)

    def _beyond(self, key: str, place: np.ndarray, position: np.ndarray) -> np.ndarray:
        """bool[N]: rows at seconds of their video file at which another episode has begun, or theirs has ended.

        place: i64[N], of each row's episode in the episode table.
        """
        chunk, number, start, end = (
            self.files.video_column(key, name)
            for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        )
        margin = 0.1 / self.files.fps  # these times may be rounded, and a video may have several frames for a row
        until = np.where(end > start, end + self.tolerance_s, np.inf)  # some say nothing, or the last frame's own time
        _, file = np.unique(np.stack([chunk, number], axis=1), axis=0, return_inverse=True)
        file = file.reshape(-1)
        for one in np.unique(file):
            inside = np.flatnonzero(file == one)
            begins = np.append(np.unique(start[inside][start[inside] >= 0]), np.inf)
            following = begins[np.searchsorted(begins[:-1], start[inside] + margin, side="right")]
            until[inside] = np.minimum(until[inside], following - margin)
        return position > until[place]

    @property
    def caches(self) -> dict[str, CachedFrames]:
        """By camera; none where images are decoded on demand."""
        return {camera: store for camera, store in self._stores.items() if isinstance(store, CachedFrames)}

    def fill(self, label: str) -> None:
        """Decode all frames into the caches, if there are any. label: of the progress bar."""
        if self.caches:
            fill(list(self.caches.values()), label)
            self.reject_undecoded()

    def say_what_reading_takes(self) -> None:
        """Warn where each image is read with many others."""
        stores = [store for store in self._stores.values() if isinstance(store, ParquetFrames)]
        largest = max((store.largest_group() for store in stores), default=0)
        if largest > LARGE_GROUP:
            log.warning(
                "dataset %r: its images are stored in groups of rows of up to %.0f MB, and all of a group is read for"
                " one of them: set `image_cache: true`, or write its data files with smaller groups",
                self.kept.rejects.dataset,
                largest / 1e6,
            )

    def reject_undecoded(self) -> None:
        """Leave out the rows that were found not to decode."""
        for camera, cache in self.caches.items():
            bad = cache.unreadable() & self.kept.mask
            if bad.any():
                problem = cache.problem(int(np.argmax(bad)))
                self.kept.reject(bad, camera, problem, "Restore the file or leave its episodes out with `episodes`")

    def read(self, row: int) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
        """Of a row, by camera: its image u8[3 h w], and (h, w) of the picture in the dataset. Raises BadSample."""
        images = {camera: self._read(camera, row) for camera in self._stores}
        sizes = {camera: (image.shape[-2], image.shape[-1]) for camera, image in images.items()}
        return images, sizes | {camera: cache.picture_size(row) for camera, cache in self.caches.items()}

    def _read(self, camera: str, row: int) -> np.ndarray:
        try:
            return self._stores[camera].read(row)
        except BadImage as error:
            where = f"dataset {self.kept.rejects.dataset!r}, {self.kept.columns.address(row)}, {camera}"
            raise BadSample(f"{where}: {error}. Restore it or leave its episode out with `episodes`") from error

    def looks(self, rows: np.ndarray) -> dict[str, Look]:
        """Of a few rows from all over these, as their images are before they are resized."""
        rows = np.sort(rows[evenly_spaced(len(rows), LOOKED_AT)])
        found = {camera: Look.of(_readable(store, rows)) for camera, store in self._stores.items()}
        return {camera: look for camera, look in found.items() if look is not None}


def _readable(store: FrameStore | CachedFrames, rows: Iterable[int]) -> Iterator[np.ndarray]:
    for row in rows:
        with suppress(BadImage):  # whoever trains on it is told
            yield (store.origin if isinstance(store, CachedFrames) else store).read(row)
