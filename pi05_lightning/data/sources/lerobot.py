"""LeRobot v3 datasets as a source: columns read once into memory, images on demand or from a cache.

What differs from `LeRobotDataset`: no row of a table is looked up through `datasets`, files stay open, frames keep
uint8, language columns become subtasks and answers, and data that cannot be trained on is an error with an address.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from pi05_lightning.data.attempts import Attempts, of_a_policy
from pi05_lightning.data.chosen_episodes import choose_episodes
from pi05_lightning.data.columns import rows_at
from pi05_lightning.data.errors import BadSample, OnBadSample, Rejects
from pi05_lightning.data.find_dataset import find_dataset, is_download
from pi05_lightning.data.frame_cache import cache_folder
from pi05_lightning.data.labels import POSITIVE, RETURN, Labels
from pi05_lightning.data.lerobot_files import LeRobotFiles, dim_names
from pi05_lightning.data.looks import Look
from pi05_lightning.data.robot import Range, Robot
from pi05_lightning.data.sources.base import Sizes, Source, SourceConfig
from pi05_lightning.data.sources.lerobot_chunks import Chunks
from pi05_lightning.data.sources.lerobot_columns import Wanted, read_columns, sentences_of_episodes
from pi05_lightning.data.sources.lerobot_features import Features, chunk_steps, relative_actions
from pi05_lightning.data.sources.lerobot_images import Images
from pi05_lightning.data.sources.lerobot_rejects import (
    Kept,
    reject_not_finite,
    reject_outliers,
    reject_texts,
    reject_zero_range,
    say_how_it_is_read,
)
from pi05_lightning.data.split import Split, check_fraction
from pi05_lightning.data.statistics import FeatureStats
from pi05_lightning.data.transforms import Normalize
from pi05_lightning.files.ranges import check_range
from pi05_lightning.types import Answer, Frame, Modality, Shapes

log = logging.getLogger(__name__)

Frames = Literal["all", "corrections", "positive", "negative"]


@dataclass(frozen=True)
class LeRobotConfig(SourceConfig):
    """A LeRobot v3 dataset and what to take from it."""

    splits: ClassVar[tuple[Split, ...]] = ("train", "val", "test")

    path: str
    """Folder of the dataset, or its Hub id: `owner/name`, or `owner/name@revision` for a branch, a tag or a commit."""
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
    """Folder for cached frames; by default .cache/pi05 beside the dataset, or the user's cache if that is read-only."""
    tolerance_s: float = 1e-4
    """How far, in seconds, a video frame may be from its timestamp; less than half a frame."""
    convert_images: bool = False
    """Take grey, transparent and 16-bit images too: grey in every channel, over white, scaled to 8 bits."""
    labels: str | None = None
    """File of `pi05 value label` that says of every frame whether its advantage is positive, for prompts to say it;
    `positive` for demonstrations, which all are. Labels that do not fit the dataset, or the value, are an error."""
    frames: Frames = "all"
    """Only those in which somebody corrected the policy, as their column `intervention` says (DAgger), or those whose
    advantage has this sign in `labels`; corrections are positive."""
    same_robot_as: str | None = None
    """Another source of the same robot, whose statistics normalise this one's frames: a policy acts as that one."""
    on_bad_sample: OnBadSample = "error"
    """Whether a frame that cannot be trained on stops the run or is left out, counted and logged."""

    def __post_init__(self) -> None:
        check_fraction(self.val_fraction)
        for key in ("horizon_seconds", "min_range", "box_range", "tolerance_s"):
            check_range(key, getattr(self, key), 0, above=True)
        if self.horizon_steps is not None:
            check_range("horizon_steps", self.horizon_steps, 1)
            if self.horizon_seconds is not None:
                raise ValueError("give horizon_steps or horizon_seconds, not both")
        for key in ("relative_dims", "relative_state_dims"):
            for dim in getattr(self, key) or ():
                check_range(key, dim, 0)

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
    answers: whether questions and answers are read, which numbers alone need not.
    """

    def __init__(
        self,
        config: LeRobotConfig,
        name: str,
        split: Split,
        horizon: int,
        image_size: tuple[int, int],
        answers: bool = True,
    ):
        self.config, self.name, self.split, self.horizon = config, name, split, horizon
        self.image_size, self.answers = image_size, answers
        self.rejects: Rejects = Rejects(name, config.on_bad_sample)
        self.on_bad_sample = config.on_bad_sample
        self.files = LeRobotFiles.open(find_dataset(config.path))
        is_named = not Path(config.path).expanduser().is_dir()
        self.hub_id = config.path if is_named and is_download(self.files.root) else None
        if config.task is not None and not config.task.strip():
            raise ValueError(f"dataset {name!r}: `task` is {config.task!r}: say what is done, or leave it out")
        features = Features(self.files.features, f"dataset {name!r}")
        self.cameras = features.cameras(self.files.cameras(), config.cameras, config.convert_images)
        self._box_range = features.box_range(self.cameras, config.box_range)
        steps = chunk_steps(config.horizon_seconds, config.horizon_steps, self.files.fps, horizon, features.where)
        if config.tolerance_s >= 0.5 / self.files.fps:
            most = 0.5 / self.files.fps
            raise ValueError(f"tolerance_s must be between 0 and half a frame, {most:.4f} s at {self.files.fps:g} fps")
        state = features.widths(config.state_keys, "state_keys")
        action = features.widths(config.action_keys, "action_keys")
        relative = config.relative_dims, config.relative_state_dims
        self.relative = relative_actions(*relative, sum(state.values()), sum(action.values()), features.where)
        wanted = Wanted(state, action, config.subtask_key, self.cameras, self._box_range, answers)
        taught = sentences_of_episodes(self.files, config.subtask_key)
        if of_a_policy(self.files):  # its own words: an episode with new ones may be held out all the same
            taught = {n: {said for said in sentences if said[0] == "task"} for n, sentences in taught.items()}
        episodes = choose_episodes(self.files, split, config.val_fraction, config.episodes, taught)
        self.columns = read_columns(self.files, episodes, wanted, self.rejects)
        self._task = self.columns.task if config.task is None else self.columns.task.filled(config.task)
        self._kept = Kept(self.columns, self.rejects)
        self._chunks = Chunks(self.columns, self._chunk_ends(), horizon, steps, self.relative)
        self._horizon = steps if steps < horizon else None
        self._robot: Robot | None = None
        self._is_trained_on = False
        self._advantage, self._returns = self._read_labels()
        self.tells_advantage, self.tells_return = self._advantage is not None, self._returns is not None
        self.same_robot_as = self.config.same_robot_as
        self._kept.mask &= self._chosen()  # what is wrong with other frames is nobody's concern
        if self._kept.mask.any():  # of the episodes that could not be read as large a part is meant as of the others
            self.rejects.frames = round(self.rejects.frames * self._kept.mask.mean())
        self.teaches_subtask = self._taught_subtasks()
        reject_texts(self._kept, self._task, self.teaches_subtask)
        reject_not_finite(self._kept, self._chunks, config.state_keys, config.action_keys)
        self._images = self._open_images()
        say_how_it_is_read(self.columns, self.files, config.subtask_key, f"dataset {name!r}, {split} split")
        if not any(cache.missing() for cache in self._images.caches.values()):
            self._images.reject_undecoded()
        self._rows = self._kept.rows
        if len(episodes) and not len(self._rows):
            if config.frames == "all":
                raise self._nothing_left()
            where = f"the {split} split of {config.path}"
            said = f"dataset {name!r}: {where} has no frame of `frames: {config.frames}`"
            if split == "train":
                raise ValueError(
                    f"{said}: leave it out, or record more attempts; where all of them fail, `--corrections` lets an"
                    " expert take over"
                )
            log.warning("%s: there is none of it to measure on", said)

    def __reduce__(self) -> tuple:
        # a spawned worker reads the columns anew: quicker than pickling them
        arguments = self.config, self.name, self.split, self.horizon, self.image_size, self.answers
        return LeRobotSource, arguments, self._robot

    def __setstate__(self, robot: Robot | None) -> None:
        self.leave_out_unexplained(robot)

    @property
    def camera_names(self) -> list[str]:
        return list(self.cameras.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Frame:
        row, motion = int(self._rows[index]), self.motion(index)
        answers = self.columns.answers[row]
        images, sizes = self._images.read(row)
        self._check_sizes(row, answers, sizes)
        return Frame(
            images=images,
            picture_sizes=sizes,
            task=self._task[row] or "",
            subtask=self.columns.subtask[row],
            subtask_is_target=bool(self.teaches_subtask[row]),
            answers=answers,
            state=motion.state,
            actions=motion.actions,
            action_is_pad=motion.action_is_pad,
            advantage=None if self._advantage is None else ("positive" if self._advantage[row] else "negative"),
            returns=None if self._returns is None else float(self._returns[row]),
        )

    def motion(self, index: int) -> Frame:
        """A sample's state and actions alone, for which no image is read."""
        row = int(self._rows[index])
        actions, is_pad = self._chunks.at(row) if self.config.action_keys else (None, None)
        state = self.columns.state[row] if self.config.state_keys else None
        return Frame(state=state, actions=actions, action_is_pad=is_pad)

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: frames with a question (qa), with a subtask (hl_subtask), with actions (the two of robot actions)."""
        match modality:
            case Modality.QA:
                useful = np.isin(self._rows, self.columns.answers.rows)
            case Modality.HL_SUBTASK:
                useful = (self.columns.subtask.codes[self._rows] >= 0) & self.teaches_subtask[self._rows]
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
        return Sizes(
            images=len(self.cameras),
            task=self._task.characters(rows),
            subtask=columns.subtask.characters(rows),
            taught=self.teaches_subtask[rows],
        )

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
        if self.split == "train":  # said once
            self._images.say_what_reading_takes()
        self._images.fill(f"{self.name} ({self.split})")
        self._leave_out()

    def leave_out_unexplained(self, robot: Robot | None) -> bool:
        self._robot, before = robot, len(self._rows)
        if robot is None:
            return False
        reject_outliers(self._kept, self._chunks, robot, self.config.state_keys, self.config.action_keys)
        self._leave_out()
        return len(self._rows) < before

    def _leave_out(self) -> None:
        """The rows that were found bad. ValueError where there were others and none is left."""
        before, self._rows = len(self._rows), self._kept.rows
        if before and not len(self._rows):
            raise self._nothing_left()

    def _nothing_left(self) -> ValueError:
        where = f"the {self.split} split of {self.config.path}"
        return ValueError(f"dataset {self.name!r}: no usable frame is left in {where}")

    def robot(self) -> Robot | None:
        """Statistics of what is trained on, rate, tasks and names; None without state and actions.

        Those of `same_robot_as` once `leave_out_unexplained` was told them. Raises BadSample for a dimension without
        range, unless that is to be skipped.
        """
        if not self.config.action_keys and not self.config.state_keys:
            return None
        shared = self._robot if self.same_robot_as is not None else None
        tasks = sorted({self._task.values[code] for code in np.unique(self._task.codes[self._rows])})
        return Robot(
            normalize=self._normalize() if shared is None else shared.normalize,
            fps=self.files.fps,
            tasks=tuple(tasks),
            dataset=self.config.path,
            is_on_hub=self.hub_id is not None,
            state_keys=tuple(self.config.state_keys),
            action_keys=tuple(self.config.action_keys),
            relative=self.relative,
            embodiment=self.config.embodiment,
            control_mode=self.config.control_mode,
            has_subtasks=len(self.indices(Modality.HL_SUBTASK)) > 0,
            cameras=tuple(self.cameras.values()),
            state_range=self._state_range(),
            horizon=self._horizon,
        )

    def checked_robot(self) -> Robot | None:
        """As of every source. BadSample also for a dimension that varies too rarely, whatever is to be skipped."""
        self._is_trained_on = True
        return super().checked_robot()

    def looks(self) -> dict[str, Look]:
        """Of a few frames from all over the split, as they are before they are resized."""
        return self._images.looks(self._rows)

    def _state_range(self) -> Range | None:
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

        A frame that turns out bad only when it is read, as where a video does not decode and no image cache has told,
        is still among them.
        """
        return self._chunks.statistics(self._rows)

    def _normalize(self) -> Normalize:
        """Quantiles of state and action as trained."""
        config = self.config
        state, action = self.statistics()
        if config.min_range is not None:
            return Normalize(*(found.quantiles.widened(config.min_range) for found in (state, action)))
        for keys, values, found, relative in (
            (config.state_keys, self.columns.state, state, ()),
            (config.action_keys, self.columns.action, action, self.relative.dims if self.relative else ()),
        ):
            can_skip = not self._is_trained_on
            reject_zero_range(self._kept, self._rows, keys, values, found, relative, rare_can_skip=can_skip)
        return Normalize(state.quantiles, action.quantiles)

    def _read_labels(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Whether each row's advantage is positive, bool[N], and its return, f32[N], as far as there are labels."""
        if self.config.labels is None:
            return None, None
        if self.config.labels == "positive":
            return np.ones(len(self.columns.episode), dtype=bool), None
        path = Path(self.config.labels).expanduser()
        try:
            found = Labels.read(path, self.files).at(self.columns.episode, self.columns.frame, path)
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}, {error}") from error
        return found.get(POSITIVE), found.get(RETURN)

    def _chosen(self) -> np.ndarray:
        """Which rows `frames` names, bool[N]."""
        match self.config.frames:
            case "corrections":
                return self._corrected
            case "positive" | "negative" as sign:
                if self._advantage is None:
                    raise ValueError(f"dataset {self.name!r}: `frames: {sign}` needs `labels` that say which are")
                return self._advantage == (sign == "positive")
            case _:
                return np.ones(len(self.columns.episode), dtype=bool)

    def _taught_subtasks(self) -> np.ndarray:
        """Which rows' subtasks can be learned, bool[N]: in a policy's attempts not those that it said itself."""
        if of_a_policy(self.files):
            return self._corrected
        return np.ones(len(self.columns.episode), dtype=bool)

    def _chunk_ends(self) -> np.ndarray:
        """The row before which each row's chunk ends, i64[N]: its episode's end.

        Where it counts whose actions they are, that of a correction ends with it: what the policy did next is not
        learned. What a policy did is learned with the correction that it was given.
        """
        end = self.columns.end
        if self.config.frames == "all" and self.config.labels in (None, "positive"):
            return end
        over = np.append(np.flatnonzero(np.diff(self._corrected.astype(int)) < 0) + 1, len(end))
        ends = np.minimum(end, over[np.searchsorted(over, np.arange(len(end)), side="right")])
        return np.where(self._corrected, ends, end)

    @cached_property
    def _corrected(self) -> np.ndarray:
        """Which rows' actions were a correction, bool[N]."""
        attempts = Attempts.read(self.files, demonstrations=True)
        own = self.columns.episode, self.columns.frame
        return attempts.intervention[rows_at(attempts.episode, attempts.frame, own)]

    def _open_images(self) -> Images:
        config, cache = self.config, None
        if config.image_cache:
            folder = cache_folder(self.files.root, Path(config.cache_dir) if config.cache_dir else None)
            cache = folder, self.image_size
        return Images(self.files, self._kept, self.cameras, cache, config.tolerance_s, config.convert_images)

    def _check_sizes(self, row: int, answers: Iterable[Answer], sizes: dict[str, tuple[int, int]]) -> None:
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
