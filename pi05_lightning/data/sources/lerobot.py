"""LeRobot v3 datasets as a source: columns read once into memory, images on demand or from a cache.

What differs from `LeRobotDataset`: no row of a table is looked up through `datasets`, files stay open, frames keep
uint8, language columns become subtasks and answers, and data that cannot be trained on is an error with an address.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from pi05_lightning.data.attempts import Attempts
from pi05_lightning.data.columns import rows_at
from pi05_lightning.data.errors import BadImage, BadSample, OnBadSample, Rejects
from pi05_lightning.data.frame_cache import CachedFrames, cache_folder, fill
from pi05_lightning.data.frames import FrameStore, ParquetFrames, VideoFrames, VideoHeader
from pi05_lightning.data.labels import POSITIVE, RETURN, Labels
from pi05_lightning.data.lerobot_files import LeRobotFiles, dim_names, find_dataset
from pi05_lightning.data.looks import Look
from pi05_lightning.data.places import misplaced
from pi05_lightning.data.robot import OUTLIER, OUTLIER_REMEDY, Robot, outlier
from pi05_lightning.data.sources.base import Sizes, Source, SourceConfig
from pi05_lightning.data.sources.language import PERSISTENT, SUBTASK_INDEX
from pi05_lightning.data.sources.lerobot_columns import Wanted, read_columns, sentences_of_episodes
from pi05_lightning.data.sources.lerobot_features import Features, chunk_steps, relative_actions
from pi05_lightning.data.split import Split, check_fraction
from pi05_lightning.data.statistics import FeatureStats, offsets, steps_trained_on
from pi05_lightning.data.transforms import Normalize, Quantiles
from pi05_lightning.files.ranges import check
from pi05_lightning.types import Answer, Frame, Modality, Shapes

log = logging.getLogger(__name__)

LOOKED_AT = 16  # frames that tell how a camera's images look


@dataclass(frozen=True)
class LeRobotConfig(SourceConfig):
    """A LeRobot v3 dataset and what to take from it."""

    splits: ClassVar[tuple[Split, ...]] = ("train", "val", "test")

    path: str
    """Folder of the dataset, or its Hub id."""
    cameras: dict[str, str] | None = None
    """Image features to read, each with its camera name; all of them by default, named by the key's last part."""
    state_keys: list[str] = field(default_factory=lambda: ["observation.state"])
    """Features concatenated into the state; none for data without one."""
    action_keys: list[str] = field(default_factory=lambda: ["action"])
    """Features concatenated into the action; none for data without actions."""
    horizon_steps: int | None = None
    """Frames of an action chunk, up to the model's horizon, which is the default; what is left of it is padding."""
    horizon_seconds: float | None = None
    """The same in time; it must be a whole number of frames."""
    relative_dims: list[int] = field(default_factory=list)
    """Dims of the concatenated action that are trained relative to the state at the chunk's first frame."""
    relative_state_dims: list[int] | None = None
    """Dims of the concatenated state that these are relative to, in the same order; by default the same numbers."""
    min_range: float | None = None
    """Widen dims of less range (q99 - q01, real units) to this; without it one that does not vary is an error."""
    embodiment: str = ""
    """The robot's name, for prompts that say `{embodiment}`."""
    control_mode: str = ""
    """What its actions are, for prompts that say `{control_mode}`."""
    val_fraction: float = 0.1
    """Share of episodes held out where meta/info.json names no validation split; 0 holds out none.
    An episode whose task or subtask no earlier one has is never held out."""
    episodes: list[int] | str | None = None
    """Only these episode numbers, or those that meet an SQL condition on their metadata, as "length >= 50"."""
    subtask_key: str | None = None
    """Column with the subtask, as text or as subtask_index; by default language_persistent, and for episodes that have
    none there subtask_index."""
    box_range: float | None = None
    """What boxes written as numbers in language_events reach to: 1 or 1000, say; by default the image's pixels."""
    task: str | None = None
    """Task sentence for frames that have none."""
    image_cache: bool = False
    """Decode all frames once, at the model's size, into files under `cache_dir`."""
    cache_dir: str | None = None
    """Folder for cached frames; by default .cache/pi05 in the dataset, or the user's cache if that is read-only."""
    tolerance_s: float = 1e-4
    """How far, in seconds, a video frame may be from its timestamp; less than half a frame."""
    convert_images: bool = False
    """Take grey, transparent and 16-bit images too: grey in every channel, over white, scaled to 8 bits."""
    labels: str | None = None
    """File of `pi05 value label` that says of every frame whether its advantage is positive, for prompts to say it;
    `positive` for demonstrations, which all are. Labels that do not fit the dataset, or the value, are an error."""
    corrections_only: bool = False
    """Only the frames in which somebody corrected the policy, as their column `intervention` says (DAgger)."""
    same_robot_as: str | None = None
    """Another source of the same robot, whose statistics normalise this one's frames: a policy acts as that one."""
    on_bad_sample: OnBadSample = "error"
    """Whether a frame that cannot be trained on stops the run or is left out, counted and logged."""

    def __post_init__(self) -> None:
        check_fraction(self.val_fraction)
        for key in ("horizon_seconds", "min_range", "box_range", "tolerance_s"):
            if getattr(self, key) is not None:
                check(key, getattr(self, key), 0, above=True)
        if self.horizon_steps is not None:
            check("horizon_steps", self.horizon_steps, 1)
            if self.horizon_seconds is not None:
                raise ValueError("give horizon_steps or horizon_seconds, not both")
        for key in ("relative_dims", "relative_state_dims"):
            for dim in getattr(self, key) or ():
                check(key, dim, 0)

    def open(self, name: str, split: Split, shapes: Shapes) -> LeRobotSource:
        """Raises ValueError for a wrong configuration and BadSample for bad data, unless that is to be skipped."""
        source = LeRobotSource(self, name, split, shapes.horizon, (shapes.image_size, shapes.image_size))
        dims = source.columns.action.shape[1]
        if dims > shapes.action_dim:
            raise ValueError(
                f"dataset {name!r}: its action has {dims} dims, and the model has {shapes.action_dim}: set"
                f" model.config.action_dim to {dims} or more, or name fewer action_keys"
            )
        return source


class LeRobotSource(Source):
    """Frames of a dataset's chosen episodes, in its order, each with the action chunk that starts there.

    horizon: steps of a chunk.  image_size: (H, W) of cached frames; without a cache frames keep their own size.
    """

    def __init__(self, config: LeRobotConfig, name: str, split: Split, horizon: int, image_size: tuple[int, int]):
        self.config, self.name, self.split, self.horizon, self.image_size = config, name, split, horizon, image_size
        self.rejects: Rejects = Rejects(name, config.on_bad_sample)
        self.on_bad_sample = config.on_bad_sample
        self.files = LeRobotFiles.open(find_dataset(config.path))
        if config.task is not None and not config.task.strip():
            raise ValueError(f"dataset {name!r}: `task` is {config.task!r}: say what is done, or leave it out")
        features = Features(self.files.features, f"dataset {name!r}")
        self.cameras = features.cameras(self.files.cameras(), config.cameras, config.convert_images)
        self._box_range = features.box_range(self.cameras, config.box_range)
        self._steps = chunk_steps(config.horizon_seconds, config.horizon_steps, self.files.fps, horizon, features.where)
        if config.tolerance_s >= 0.5 / self.files.fps:
            most = 0.5 / self.files.fps
            raise ValueError(f"tolerance_s must be between 0 and half a frame, {most:.4f} s at {self.files.fps:g} fps")
        state, action = features.widths(config.state_keys), features.widths(config.action_keys)
        relative = config.relative_dims, config.relative_state_dims
        self._relative = relative_actions(*relative, sum(state.values()), sum(action.values()), features.where)
        wanted = Wanted(state, action, config.subtask_key, self.cameras, self._box_range)
        taught = sentences_of_episodes(self.files, config.subtask_key)
        episodes = self.files.choose(split, config.val_fraction, config.episodes, taught)
        self.columns = read_columns(self.files, episodes, wanted, self.rejects)
        self._task = self.columns.task if config.task is None else self.columns.task.filled(config.task)
        self._kept = np.ones(len(self.columns.episode), dtype=bool)
        self._robot: Robot | None = None
        self._advantage, self._returns = self._read_labels()
        self.tells_advantage, self.same_robot_as = self._advantage is not None, self.config.same_robot_as
        self._reject_values()
        if config.corrections_only:
            self._kept &= self._corrected()
        self._images = {camera: self._store(key) for key, camera in self.cameras.items()}
        self._rows = np.flatnonzero(self._kept)
        self._say_how_it_is_read()
        if not any(cache.missing() for cache in self._caches.values()):
            self._reject_undecoded()
        if len(episodes) and not len(self._rows):
            raise ValueError(f"dataset {name!r}: no usable frame is left in the {split} split of {config.path}")

    def __reduce__(self) -> tuple:
        # a spawned worker reads the columns anew: quicker than pickling them
        return LeRobotSource, (self.config, self.name, self.split, self.horizon, self.image_size), self._robot

    def __setstate__(self, robot: Robot | None) -> None:
        self.check(robot)

    @property
    def camera_names(self) -> list[str]:
        return list(self.cameras.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Frame:
        row = int(self._rows[index])
        actions, is_pad = self._chunk(row)
        answers = self.columns.answers[row]
        images = {camera: self._image(camera, row) for camera in self.cameras.values()}
        sizes = {camera: image.shape[1:] for camera, image in images.items()}
        sizes |= {camera: cache.picture_size(row) for camera, cache in self._caches.items()}
        self._check_sizes(row, answers, sizes)
        return Frame(
            images=images,
            picture_sizes=sizes,
            task=self._task[row] or "",
            subtask=self.columns.subtask[row],
            answers=answers,
            state=self.columns.state[row] if self.config.state_keys else None,
            actions=actions,
            action_is_pad=is_pad,
            advantage=None if self._advantage is None else ("positive" if self._advantage[row] else "negative"),
            returns=None if self._returns is None else float(self._returns[row]),
        )

    def _read_labels(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Whether each row's advantage is positive, bool[N], and its return, f32[N], as far as there are labels."""
        if self.config.labels is None:
            return None, None
        if self.config.labels == "positive":
            return np.ones(len(self.columns.episode), dtype=bool), None
        path = Path(self.config.labels)
        try:
            found = Labels.read(path, self.files).at(self.columns.episode, self.columns.frame, path)
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}, {error}") from error
        return found.get(POSITIVE), found.get(RETURN)

    def _corrected(self) -> np.ndarray:
        """Which rows' actions were a correction, bool[N]."""
        attempts = Attempts.read(self.files, demonstrations=True)
        return attempts.intervention[
            rows_at(attempts.episode, attempts.frame, (self.columns.episode, self.columns.frame))
        ]

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: frames with a question (qa), with a subtask (hl_subtask), with actions (the two of robot actions)."""
        match modality:
            case Modality.QA:
                useful = np.isin(self._rows, self.columns.answers.rows)
            case Modality.HL_SUBTASK:
                useful = self.columns.subtask.codes[self._rows] >= 0
            case Modality.FAST | Modality.CONTINUOUS:
                useful = np.full(len(self), bool(self.config.action_keys))
            case _:
                useful = np.zeros(len(self), dtype=bool)
        return np.flatnonzero(useful)

    def sizes(self, modality: Modality) -> Sizes:
        """By the characters of task, subtask, and questions with their answers, each of which is about one image."""
        rows, columns = self._rows[self.indices(modality)], self.columns
        if modality is Modality.QA:
            return Sizes(images=min(1, len(self.cameras)), answers=columns.answers.characters(rows))
        return Sizes(len(self.cameras), self._task.characters(rows), columns.subtask.characters(rows))

    def address(self, index: int) -> str:
        """The frame in words: "dataset 'x', episode 3, frame 17"."""
        return f"dataset {self.name!r}, {self.columns.address(self._rows[index])}"

    def place(self, index: int) -> dict[str, int | float]:
        """Episode, frame and the time from the episode's start in seconds, as LeRobot names them."""
        row, columns = self._rows[index], self.columns
        place = int(columns.episode[row]), int(columns.frame[row]), float(columns.timestamp[row])
        return dict(zip(("episode_index", "frame_index", "timestamp"), place, strict=True))

    def names(self, part: Literal["state", "action"]) -> dict[str, list[str] | None]:
        """What meta/info.json says of the chosen features."""
        keys = self.config.state_keys if part == "state" else self.config.action_keys
        return {key: dim_names(self.files.features[key]) for key in keys}

    def prepare(self) -> None:
        """Decode all frames into the cache, if one is wanted; raises BadSample for frames that do not decode."""
        if self._caches:
            fill(list(self._caches.values()), f"{self.name} ({self.split})")
            self._reject_undecoded()

    def check(self, robot: Robot | None) -> bool:
        """Leave out the frames that this robot's statistics do not explain; BadSample unless they are to be skipped."""
        self._robot, before = robot, len(self._rows)
        if robot is None:
            return False
        columns = self.columns
        far_state, far_action = self._beyond(robot.normalize.state, columns.state), self._far_chunks(robot)
        for keys, bad in ((self.config.state_keys, far_state), (self.config.action_keys, far_action)):
            bad &= self._kept
            if bad.any():
                row = int(np.argmax(bad))
                actions, is_pad = self._chunk(row)
                frame = robot.to_model(Frame({}, state=columns.state[row], actions=actions, action_is_pad=is_pad))
                if (
                    bad is far_action and frame.actions is not None
                ):  # the step that is wrong, not where its chunk begins
                    row += int(np.argmax((np.abs(frame.actions) > OUTLIER).any(axis=1)))
                self._reject(bad, " + ".join(keys), outlier(frame) or "", OUTLIER_REMEDY, row)
        self._rows = np.flatnonzero(self._kept)
        return len(self._rows) < before

    @staticmethod
    def _beyond(quantiles: Quantiles, values: np.ndarray) -> np.ndarray:
        """Which rows f32[N D] hold a value that no statistics explain, bool[N]."""
        return (np.abs(quantiles.normalize(values)) > OUTLIER).any(axis=1)

    def _far_chunks(self, robot: Robot) -> np.ndarray:
        """Which rows' chunks hold such a value, bool[N]."""
        columns, relative, quantiles = self.columns, robot.relative, robot.normalize.action
        if relative is None:
            return self._in_chunk(self._beyond(quantiles, columns.action))
        far = np.zeros(len(columns.end), dtype=bool)
        for step in range(self._steps):
            action = columns.action[np.minimum(np.arange(len(far)) + step, columns.end - 1)]
            action[:, list(relative.dims)] -= columns.state[:, list(relative.state_dims)]
            far |= self._beyond(quantiles, action)
        return far

    def robot(self) -> Robot | None:
        """Statistics of what is trained on, rate, tasks and names; None without state and actions.

        Raises BadSample for a dimension without range, unless that is to be skipped.
        """
        if not self.config.action_keys and not self.config.state_keys:
            return None
        tasks = sorted({self._task.values[code] for code in np.unique(self._task.codes[self._rows])})
        return Robot(
            normalize=self._normalize(),
            fps=self.files.fps,
            tasks=tuple(tasks),
            dataset=self.config.path,
            relative=self._relative,
            embodiment=self.config.embodiment,
            control_mode=self.config.control_mode,
            has_subtasks=len(self.indices(Modality.HL_SUBTASK)) > 0,
            cameras=tuple(self.cameras.values()),
            state_range=self._state_range(),
        )

    def looks(self) -> dict[str, Look]:
        """Of a few frames from all over the split, as they are before they are resized."""
        rows = np.unique(self._rows[np.linspace(0, len(self._rows) - 1, LOOKED_AT).astype(int)]) if len(self) else []
        found = {camera: Look.of(self._readable(store, rows)) for camera, store in self._images.items()}
        return {camera: look for camera, look in found.items() if look is not None}

    @staticmethod
    def _readable(store: FrameStore | CachedFrames, rows: Iterable[int]) -> Iterator[np.ndarray]:
        for row in rows:
            with suppress(BadImage):  # whoever trains on it is told
                yield (store.origin if isinstance(store, CachedFrames) else store).read(row)

    def _state_range(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Least and greatest state of the frames that are trained on; None without any."""
        if not len(self._rows):
            return None
        state = self.columns.state[self._rows]
        return tuple(state.min(axis=0).tolist()), tuple(state.max(axis=0).tolist())

    @property
    def rows(self) -> np.ndarray:
        """i64: the row of every frame in `columns`."""
        return self._rows

    @property
    def episode(self) -> np.ndarray:
        """i64: the episode of every frame."""
        return self.columns.episode[self._rows]

    def statistics(self) -> tuple[FeatureStats, FeatureStats]:
        """Of the state and of the action, over exactly what is trained on.

        The state counts at every frame, and an action once if some frame's chunk holds it; a dim relative to the state
        counts once for every frame and action of its chunk.  A frame that turns out bad only when it is read, as where
        a video does not decode and no image cache has told, is still among them.
        """
        rows, state, action = self._rows, self.columns.state, self.columns.action
        stop = np.minimum(rows + self._steps, self.columns.end[rows])
        steps, relative = steps_trained_on(rows, stop, len(action)), self._relative
        states = dict(zip(relative.dims, relative.state_dims, strict=True)) if relative else {}
        return FeatureStats.of(state[rows, dim] for dim in range(state.shape[1])), FeatureStats.of(
            offsets(action[:, dim], state[:, states[dim]], rows, stop) if dim in states else action[steps, dim]
            for dim in range(action.shape[1])
        )

    def _normalize(self) -> Normalize:
        """Quantiles of state and action as trained."""
        config = self.config
        state, action = (found.quantiles for found in self.statistics())
        if config.min_range is not None:
            return Normalize(state.widened(config.min_range), action.widened(config.min_range))
        self._reject_zero_range(config.state_keys, self.columns.state, state)
        self._reject_zero_range(config.action_keys, self.columns.action, action)
        return Normalize(state, action)

    def _reject_zero_range(self, keys: list[str], values: np.ndarray, quantiles: Quantiles) -> None:
        dims = np.flatnonzero(quantiles.q01 == quantiles.q99)
        if len(dims):
            odd = self._rows[(values[self._rows][:, dims] != quantiles.q01[dims]).any(axis=1)]
            row = int(odd[0]) if len(odd) else int(self._rows[0])
            self.rejects.add(
                f"{self.columns.address(row)}, {' + '.join(keys)}",
                f"dimensions {dims.tolist()} have no range: both quantiles are {quantiles.q01[dims].tolist()}",
                "Set `min_range`, 0.01 say, to give them one, or take other features",
                0,
            )

    def _reject_values(self) -> None:
        """Frames without a task, and frames whose state or action chunk holds NaN or infinity."""
        columns = self.columns
        remedy = "Add it to meta/tasks.parquet or give `task`"
        self._reject(self._task.codes < 0, "task_index", "it has no task sentence", remedy)
        for what, texts in (("task", self._task), ("subtask", columns.subtask)):
            for code, text in enumerate(texts.values):
                if problem := misplaced(text):
                    self._reject(texts.codes == code, what, f"{text!r}: {problem}", "Correct the text")
        bad_state, bad_action = (~np.isfinite(values).all(axis=1) for values in (columns.state, columns.action))
        remedy = "Correct the data or leave the episode out with `episodes`"
        for keys, values, bad in (
            (self.config.state_keys, columns.state, bad_state),
            (self.config.action_keys, columns.action, self._in_chunk(bad_action)),
        ):
            for row, dim in np.argwhere(~np.isfinite(values))[:1]:
                self._reject(bad, " + ".join(keys), f"value {dim} is {values[row, dim]}", remedy, row)

    def _say_how_it_is_read(self) -> None:
        """Warn of what the data leaves open, once."""
        columns, where = self.columns, f"dataset {self.name!r}, {self.split} split"
        gaps = (np.diff(columns.timestamp) > 1.5 / self.files.fps) & (np.diff(columns.episode) == 0)
        if gaps.any():
            log.warning(
                "%s: between %d of its frames and the next, the first in %s, some were left out. As in LeRobot, an"
                " action chunk goes on with the frames that there are, and there takes less time than it had",
                where,
                gaps.sum(),
                columns.address(int(np.argmax(gaps))),
            )
        indexed, timed = columns.subtasks_from[SUBTASK_INDEX], columns.subtasks_from[PERSISTENT]
        if indexed and PERSISTENT in self.files.features and self.config.subtask_key is None:
            log.warning(
                "%s: %s has subtasks of %d episodes; those of %d others are taken from %s. Name the one that counts as"
                " `subtask_key` to read no other",
                where,
                PERSISTENT,
                timed,
                indexed,
                SUBTASK_INDEX,
            )

    def _in_chunk(self, bad: np.ndarray) -> np.ndarray:
        """Which rows' chunks hold a row for which bool[N] holds, bool[N]."""
        until = np.concatenate([[0], np.cumsum(bad)])
        return until[np.minimum(np.arange(len(bad)) + self._steps, self.columns.end)] > until[:-1]

    def _reject(self, bad: np.ndarray, what: str, problem: str, remedy: str, row: int | None = None) -> None:
        """Leave out the frames for which bool[N] holds, if any; row: the one to name, by default the first of them."""
        if bad.any():
            where = f"{self.columns.address(int(np.argmax(bad)) if row is None else row)}, {what}"
            self.rejects.add(where, problem, remedy, int(bad.sum()))
            self._kept &= ~bad

    # Images.

    def _store(self, key: str) -> FrameStore | CachedFrames:
        columns, feature = self.columns, self.files.features[key]
        if feature["dtype"] == "image":
            store: FrameStore = ParquetFrames(
                columns.files, columns.file, columns.file_row, key, self.files.root, self.config.convert_images
            )
        else:
            store = self._video(key)
        if not self.config.image_cache:
            return store
        folder = cache_folder(self.files.root, Path(self.config.cache_dir) if self.config.cache_dir else None)
        return CachedFrames(store, self.image_size, folder / key)

    def _video(self, key: str) -> VideoFrames:
        columns, files = self.columns, self.files
        place = np.searchsorted(files.column("episode_index"), columns.episode)
        chunk, number, start = (
            files.video_column(key, name)[place] for name in ("chunk_index", "file_index", "from_timestamp")
        )
        remedy = "Restore the video, leave its episodes out with `episodes`, or the camera with `cameras`"
        self._reject(np.isnan(start), key, "this episode has no video of this camera", remedy)
        location = np.nan_to_num(np.stack([chunk, number], axis=1), nan=-1).astype(np.int64)
        numbers, file = np.unique(location.reshape(-1, 2), axis=0, return_inverse=True)
        paths = [files.video_path(key, *number) for number in numbers]
        position, config = start + columns.timestamp, self.config
        with ThreadPoolExecutor() as pool:
            headers = list(pool.map(VideoHeader.read, paths))
        for i, header in enumerate(headers):
            here = (file == i) & ~np.isnan(start)
            self._reject(here & bool(header.problem(files.fps)), key, header.problem(files.fps), remedy)
            late = here & (position > header.end + config.tolerance_s) & self._kept
            if late.any():
                shown = f"{paths[i]} ends at {header.end:.4f} s, and this frame is at {position[late][0]:.4f} s of it"
                self._reject(late, key, shown, "Correct where the episode is in meta/episodes, or restore the video")
        return VideoFrames(paths, file.astype(np.int32), position, config.tolerance_s, config.convert_images)

    @property
    def _caches(self) -> dict[str, CachedFrames]:
        return {camera: store for camera, store in self._images.items() if isinstance(store, CachedFrames)}

    def _reject_undecoded(self) -> None:
        for camera, cache in self._caches.items():
            bad = cache.unreadable() & self._kept
            if bad.any():
                problem = cache.problem(int(np.argmax(bad)))
                self._reject(bad, camera, problem, "Restore the file or leave its episodes out with `episodes`")
        self._rows = np.flatnonzero(self._kept)

    def _image(self, camera: str, row: int) -> np.ndarray:
        try:
            return self._images[camera].read(row)
        except BadImage as error:
            where = f"dataset {self.name!r}, {self.columns.address(row)}, {camera}"
            raise BadSample(f"{where}: {error}. Restore it or leave its episode out with `episodes`") from error

    def _check_sizes(self, row: int, answers: Iterable[Answer], sizes: dict[str, tuple[int, ...]]) -> None:
        """Raises BadSample for a box in pixels of an image whose size is not the declared one."""
        boxed = {answer.camera for answer in answers if "<loc" in answer.answer}
        for key, camera in self.cameras.items() if boxed and not self.config.box_range else ():
            declared = tuple(map(int, self._box_range[key]))
            if boxed & {camera, None} and sizes[camera] != declared:
                raise BadSample(
                    f"dataset {self.name!r}, {self.columns.address(row)}, {camera}: its image is"
                    f" {sizes[camera][0]} x {sizes[camera][1]}, and meta/info.json says {declared[0]} x {declared[1]}:"
                    " nobody knows where its boxes are. Correct the shape, or say what they reach to as `box_range`"
                )

    def _chunk(self, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.config.action_keys:
            return None, None
        steps = np.arange(row, row + self.horizon)
        end = min(self.columns.end[row], row + self._steps)
        return self.columns.action[np.minimum(steps, end - 1)], steps >= end
