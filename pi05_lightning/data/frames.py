"""Where a dataset's images come from: video files, or image columns of parquet files.

A store answers `read(row)` with the image of one frame. It knows, per row, the file and the position in it: seconds in
a video, the row number in a parquet file. Files are opened on first use and kept open, per process.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, VideoReformatter

from pi05_lightning.data.columns import is_text
from pi05_lightning.data.errors import BadImage
from pi05_lightning.data.images import find_stored, read_stored
from pi05_lightning.data.open_files import OpenFiles, allow_open_files, check_open_files, reading_parquet

_RGB = 0  # AVCOL_SPC_RGB in FFmpeg, which PyAV has no name for
_FULL_RANGE = ("yuvj", "gray", "ya")  # formats that are of full range whether a frame says so or not
_GROUP_BYTES = 100_000_000  # of groups of rows that are kept, of each camera in each worker


class VideoDecoder:
    """One open video, read by timestamp or from start to end.

    PyAV everywhere, also where torchcodec could be loaded: the same file gives the same pixels on every machine.
    One thread each: files are decoded in parallel, more would delay the first frame after a seek, and a forked loader
    worker that frees a decoder with threads waits forever for threads that it did not inherit.
    convert: take also grey and transparent frames, see `rgb_array`.
    """

    def __init__(self, path: Path, convert: bool = False):
        self.path, self._convert = path, convert
        try:
            self._container = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            check_open_files(error, path)
            raise BadImage(f"{path} cannot be opened as a video ({error})") from error
        if not self._container.streams.video or self._container.streams.video[0].time_base is None:
            raise BadImage(f"{path} has no video stream")
        self._stream = self._container.streams.video[0]
        self._time_base = self._container.streams.video[0].time_base
        self._stream.codec_context.thread_count = 1
        rate = self._stream.average_rate
        self._period = float(1 / rate) if rate else math.nan
        self._to_rgb = VideoReformatter()  # kept, since it holds the conversion's context
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._next = math.nan  # seconds at which the decoder's next frame is due

    def close(self) -> None:
        """Close the file, which would stay open until the garbage collector finds that its parts name each other."""
        self._frames = iter(())
        self._container.close()

    @property
    def count(self) -> int:
        """Frames by the header, 0 when it does not say."""
        return self._stream.frames

    @property
    def end(self) -> float:
        """Seconds at which the last frame ends, by the header; infinite when it does not say."""
        if self._stream.duration is None:
            return math.inf
        return float(((self._stream.start_time or 0) + self._stream.duration) * self._time_base)

    def rate(self) -> float:
        """Frames a second, the median of the first ones; NaN where there is at most one."""
        self._seek(-1)
        packets = islice(self._container.demux(self._stream), 64)
        shown = sorted(packet.pts for packet in packets if packet.pts is not None)
        steps = np.diff(shown)
        return float(1 / (np.median(steps) * self._time_base)) if len(steps) and steps.all() else math.nan

    def scan(self) -> Iterator[tuple[float, np.ndarray]]:
        """Every frame in order, with its time in seconds, as u8[3 h w]; raises BadImage where decoding fails."""
        self._seek(-1)
        for frame in self._frames:
            yield self._seconds(frame), self._pixels(frame)

    def read(self, timestamp: float, tolerance: float) -> np.ndarray:
        """The frame shown at `timestamp`, u8[3 h w]; raises BadImage when none is within `tolerance` seconds."""
        is_next = -min(tolerance, self._period / 2) <= timestamp - self._next <= tolerance
        self._next = math.nan  # until one is found
        if not is_next:
            self._seek_decodable(timestamp, timestamp + tolerance)
        seen: list[float] = []
        for frame in self._frames:
            seen.append(self._seconds(frame))
            if seen[-1] >= timestamp - tolerance:
                if seen[-1] > timestamp + tolerance:
                    break
                frame = self._nearest(frame, timestamp, tolerance)
                self._next = self._seconds(frame) + self._period
                return self._pixels(frame)
        at = min(seen, key=lambda seconds: abs(seconds - timestamp), default=None)
        nearest = "nothing after it" if at is None else f"the nearest frame is at {at:.4f} s; is fps right?"
        raise BadImage(f"{self.path} has no frame at {timestamp:.4f} s ± {tolerance:g}, tolerance_s ({nearest})")

    def _nearest(self, frame: av.VideoFrame, timestamp: float, tolerance: float) -> av.VideoFrame:
        """Of a frame and those after it within the tolerance, the one that is nearest to `timestamp`."""
        while 2 * tolerance >= self._period and (following := next(self._frames, None)) is not None:
            if abs(self._seconds(following) - timestamp) >= abs(self._seconds(frame) - timestamp):
                self._frames = chain([following], self._frames)
                break
            frame = following
        return frame

    def _seek_decodable(self, timestamp: float, latest: float) -> None:
        """To a key frame from which the frame at `timestamp` decodes as it does in the order of the file.

        Mostly the last one before it. In an open GOP frames that are shown before a key frame may be stored after it
        and need what is stored before; and where columns of the picture are refreshed in turn, there is no whole
        picture to begin with: what decodes first is no intra frame.
        latest: the time by which the key frame and the first frame that decodes must be shown.
        """
        second = round(1 / self._time_base)
        target, back = round(timestamp / self._time_base) - 1, 0
        beginning = (self._stream.start_time or 0) - second
        while True:
            begin = self._seek(target)
            first = next(self._frames, None)
            if begin is not None and first is not None:
                self._frames = chain([first], self._frames)
                shown = max(begin.pts or first.pts, first.pts)
                if first.pict_type == PictureType.I and shown * self._time_base <= latest:
                    return
            if target < beginning:
                return  # there is none: reading says what there is
            reached = target if begin is None or begin.dts is None else min(begin.dts, target)
            target = reached - 1 - back
            back = max(2 * back, second)  # further each time, where a seek does not end at a key frame

    def _seek(self, pts: int) -> av.Packet | None:
        """To the key frame at or before `pts`, in the stream's time base; its packet, None where there is none."""
        try:
            self._container.seek(pts, stream=self._stream)
            packets = self._container.demux(self._stream)
            begin = next((packet for packet in packets if packet.is_keyframe), None)
        except av.FFmpegError as error:
            raise BadImage(f"{self.path} cannot be searched ({error})") from error
        self._frames = self._decode(packets if begin is None else chain([begin], packets))
        return begin

    def _decode(self, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
        try:
            for packet in packets:
                for frame in packet.decode():
                    if isinstance(frame, av.VideoFrame) and frame.pts is not None:
                        yield frame
        except av.FFmpegError as error:
            raise BadImage(f"{self.path} is damaged ({error})") from error

    def _seconds(self, frame: av.VideoFrame) -> float:
        return float(frame.pts * self._time_base)

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB by the matrix and the range that the frame names, BT.601 and limited where it names none.

        PyAV takes these for all frames unless it is told of a destination that differs.
        """
        if len(frame.format.components) != 3 and not frame.format.has_palette and not self._convert:
            raise BadImage(f"{self.path} is grey or transparent, not RGB; `convert_images: true` takes it nevertheless")
        is_full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith(_FULL_RANGE)
        try:
            rgb = self._to_rgb.reformat(
                frame,
                format="rgb24",
                src_colorspace=frame.colorspace,
                dst_colorspace=_RGB,
                src_color_range=ColorRange.JPEG if is_full else ColorRange.MPEG,
            ).to_ndarray()
        except av.FFmpegError as error:
            raise BadImage(f"{self.path} holds {frame.format.name}, which cannot be made RGB ({error})") from error
        return np.ascontiguousarray(rgb.transpose(2, 0, 1))


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video without decoding it.

    unreadable: why it cannot be read, if it cannot.  rate: frames a second, NaN if unknown.  end: of the last frame, s.
    """

    path: Path
    unreadable: str = ""
    rate: float = math.nan
    end: float = math.inf

    @classmethod
    def read(cls, path: Path) -> VideoHeader:
        if not path.exists():
            return cls(path, f"{path} is missing")
        try:
            with closing(VideoDecoder(path)) as video:
                return cls(path, rate=video.rate(), end=video.end)
        except BadImage as error:
            return cls(path, str(error))
        except av.FFmpegError as error:
            return cls(path, f"{path} is damaged ({error})")

    def problem(self, fps: float) -> str:
        """Why frames at this rate cannot be read from it; nothing where they can, as from one of twice the rate."""
        times = max(1, round(self.rate / fps)) if math.isfinite(self.rate) else 1
        if not self.unreadable and abs(self.rate / fps - times) > 0.02 * times:
            return f"{self.path} has {self.rate:.6g} frames a second, and fps in meta/info.json is {fps:g}"
        return self.unreadable


class FrameStore(ABC):
    """Images of a dataset's N frames for one camera.

    files;  file: i32[N], index into files;  position: f64[N] in that file;  tolerance: how far off a position may be;
    convert: images that are grey, transparent or of 16 bits become RGB, and are not bad.
    """

    def __init__(self, files: list[Path], file: np.ndarray, position: np.ndarray, tolerance: float, convert: bool):
        self.files, self.file, self.position = files, file, position
        self.tolerance, self.convert = tolerance, convert
        allow_open_files()

    @abstractmethod
    def read(self, row: int) -> np.ndarray:
        """Image of frame `row`, u8[3 h w]; raises BadImage."""

    @abstractmethod
    def count(self, file: int) -> int:
        """About how many frames the file holds."""

    def version(self, file: int) -> str:
        """A text that changes when the file's frames do."""
        return _version(self.files[file])

    @abstractmethod
    def scan(self, file: int) -> Iterator[tuple[float, np.ndarray | BadImage]]:
        """(position, image) in the file's order; a BadImage where one cannot be read, last where reading must end."""


def _version(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


class VideoFrames(FrameStore):
    """Frames of video files; position is the time in seconds."""

    def __init__(self, files: list[Path], file: np.ndarray, position: np.ndarray, tolerance: float, convert: bool):
        super().__init__(files, file, position, tolerance, convert)
        self._decoders: OpenFiles[int, VideoDecoder] = OpenFiles(
            lambda i: VideoDecoder(files[i], convert), capacity=32, close=VideoDecoder.close
        )

    def read(self, row: int) -> np.ndarray:
        return self._decoders[int(self.file[row])].read(float(self.position[row]), self.tolerance)

    def count(self, file: int) -> int:
        try:
            with closing(VideoDecoder(self.files[file])) as video:
                return video.count
        except BadImage:
            return 0  # scanning the file says what is wrong with it

    def scan(self, file: int) -> Iterator[tuple[float, np.ndarray | BadImage]]:
        position = 0.0
        try:
            with closing(VideoDecoder(self.files[file], self.convert)) as video:
                for position, image in video.scan():
                    yield position, image
        except BadImage as error:
            yield position, error


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column's type is one of those in which `datasets` and others store images, or where they are."""
    if pa.types.is_struct(kind):
        return not {"bytes", "path"}.isdisjoint(field.name for field in kind)
    if pa.types.is_dictionary(kind):
        return holds_images(kind.value_type)
    encoded = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    return is_text(kind) or any(is_kind(kind) for is_kind in encoded)


class ParquetFrames(FrameStore):
    """Images in a column of parquet files, as `datasets` stores them: encoded, or the path of a file.

    position is the row in the file.  root: folder of the dataset, where paths start; or they start at the parquet file.
    """

    def __init__(
        self,
        files: list[Path],
        file: np.ndarray,
        position: np.ndarray,
        column: str,
        root: Path,
        convert: bool,
    ):
        super().__init__(files, file, position, 0.25, convert)
        self._column, self._root = column, root
        self._parquet: OpenFiles[int, pq.ParquetFile] = OpenFiles(
            lambda i: pq.ParquetFile(files[i], memory_map=True), capacity=32
        )
        self._ends = OpenFiles(self._group_ends, capacity=1024)
        self._image_versions: dict[int, str] = {}
        self._groups = OpenFiles(self._read_group, capacity=_GROUP_BYTES, size=lambda group: group.nbytes)

    def read(self, row: int) -> np.ndarray:
        file, position = int(self.file[row]), int(self.position[row])
        with reading_parquet(self.files[file], BadImage):
            ends = self._ends[file]
            group = int(np.searchsorted(ends, position, side="right"))
            start = int(ends[group - 1]) if group else 0
            value = self._groups[file, group][position - start]
        return self._image(value, file)

    def count(self, file: int) -> int:
        return pq.read_metadata(self.files[file]).num_rows

    def largest_group(self) -> int:
        """Bytes of the largest group of rows, all of which are read for one of its images."""
        return max((_largest_group(pq.read_metadata(path), self._column) for path in self.files), default=0)

    def scan(self, file: int) -> Iterator[tuple[float, np.ndarray | BadImage]]:
        position = 0
        try:
            with reading_parquet(self.files[file], BadImage):
                for batch in pq.ParquetFile(self.files[file]).iter_batches(batch_size=256, columns=[self._column]):
                    for value in batch.column(0):
                        try:
                            yield position, self._image(value, file)
                        except BadImage as error:
                            yield position, error
                        position += 1
        except BadImage as error:
            yield position, error

    def version(self, file: int) -> str:
        """Of the parquet file, and of the images that it names, as they were when they were first asked for."""
        if file not in self._image_versions:
            found = [find_stored(path, self._folders(file)) for path in self._paths(file)]
            versions = "".join(f" {_version(place) if place else ''}" for place in found)
            self._image_versions[file] = hashlib.blake2b(versions.encode()).hexdigest() if found else ""
        return super().version(file) + self._image_versions[file]

    def _paths(self, file: int) -> list[str]:
        """The paths in a parquet file; none where all images are encoded in it."""
        parquet = pq.ParquetFile(self.files[file])
        kind, name = parquet.schema_arrow.field(self._column).type, self._column
        if pa.types.is_struct(kind):
            leaves = [parquet.metadata.schema.column(i).path for i in range(len(parquet.schema))]
            if f"{name}.path" not in leaves or (
                f"{name}.bytes" in leaves and not _nulls(parquet.metadata, leaves.index(f"{name}.bytes"))
            ):
                return []
            paths = parquet.read([f"{name}.path"]).column(0).combine_chunks().field("path")
        elif is_text(kind):
            paths = parquet.read([name]).column(0)
        else:
            return []
        return [path for path in paths.to_pylist() if path]

    def _group_ends(self, file: int) -> np.ndarray:
        metadata = self._parquet[file].metadata
        return np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])

    def _read_group(self, key: tuple[int, int]) -> pa.ChunkedArray:
        file, group = key
        return self._parquet[file].read_row_group(group, columns=[self._column]).column(0)

    def _image(self, value: pa.Scalar, file: int) -> np.ndarray:
        return read_stored(value.as_py(), self._folders(file), self.convert)

    def _folders(self, file: int) -> tuple[Path, Path]:
        return self._root, self.files[file].parent


def _largest_group(metadata: pq.FileMetaData, name: str) -> int:
    """Bytes of a column in the group of rows that has most of it."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaves = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return max((sum(group.column(i).total_uncompressed_size for i in leaves) for group in groups), default=0)


def _nulls(metadata: pq.FileMetaData, column: int) -> bool:
    """Whether a column may hold a null, by the statistics of its groups of rows."""
    groups = [metadata.row_group(group).column(column).statistics for group in range(metadata.num_row_groups)]
    return not all(group is not None and group.null_count == 0 for group in groups)
