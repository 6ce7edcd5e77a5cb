"""A LeRobot dataset's numbers and texts, read once, file by file, into arrays over the frames of chosen episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.columns import is_text, real_numbers, runs_of, vectors, whole_numbers
from pi05_lightning.data.errors import BadFrame, Rejects
from pi05_lightning.data.frames import holds_images
from pi05_lightning.data.lerobot_files import LeRobotFiles, Sentence
from pi05_lightning.data.open_files import reading_parquet
from pi05_lightning.data.sources.language import (
    EVENTS,
    PERSISTENT,
    SUBTASK_INDEX,
    AnswerColumn,
    TextColumn,
    active_subtasks,
    question_answers,
    read_language,
)
from pi05_lightning.types import Answer


@dataclass(frozen=True)
class Wanted:
    """What to read: vector features with their widths, the subtask's column (None: find it), cameras by feature key.

    box_range: (height, width) of each camera's image, by feature key, in the units of the boxes about it.
    answers: whether questions and answers are read.
    """

    state: dict[str, int]
    action: dict[str, int]
    subtask_key: str | None
    cameras: dict[str, str]
    box_range: dict[str, tuple[float, float]]
    answers: bool = True


@dataclass(frozen=True)
class Columns:
    """N frames in the dataset's order.

    episode, frame i64[N];  timestamp f64[N], from the episode's start;  end i64[N]: the row where the frame's episode
    ends;  file i32[N], into files, and file_row i64[N] in it;  state f32[N S], action f32[N A].
    subtasks_from: episodes that have subtasks, by the column which holds them.
    """

    files: list[Path]
    file: np.ndarray
    file_row: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    timestamp: np.ndarray
    end: np.ndarray
    state: np.ndarray
    action: np.ndarray
    task: TextColumn
    subtask: TextColumn
    answers: AnswerColumn
    subtasks_from: Counter[str]

    def address(self, row: int) -> str:
        return f"episode {self.episode[row]}, frame {self.frame[row]}"


@dataclass(frozen=True)
class _File:
    """One data file, M rows.

    runs: of rows of the same episode.  subtask_keys: the columns with subtasks, in the order in which they are asked.
    persistent, events: its language rows, see `read_language`.
    """

    path: Path
    table: pa.Table
    episode: np.ndarray
    frame: np.ndarray
    timestamp: np.ndarray
    runs: list[slice]
    subtask_keys: list[str]
    persistent: dict[int, list[dict]]
    events: dict[int, list[dict]]

    def address(self, row: int) -> str:
        return f"episode {self.episode[row]}, frame {self.frame[row]}"


def read_columns(files: LeRobotFiles, episodes: np.ndarray, wanted: Wanted, rejects: Rejects) -> Columns:
    """The rows of chosen episodes. Unreadable files, and episodes that are empty or incomplete, are rejects."""
    place = np.searchsorted(files.column("episode_index"), episodes)
    lengths = dict(zip(episodes.tolist(), files.column("length")[place].tolist(), strict=True))
    for episode in [episode for episode, length in lengths.items() if length <= 0]:
        rejects.add(f"episode {episode}", "it has no frames", "Leave it out with `episodes`", 0)
        del lengths[episode]
    paths, parts = [], []
    for path, inside in _by_file(files, lengths, rejects).items():
        part = _read_file(files, path, inside, wanted, rejects)
        if part:
            paths.append(path)
            parts.append(part)
    return _concatenate(files, paths, parts, wanted)


def sentences_of_episodes(files: LeRobotFiles, subtask_key: str | None) -> dict[int, set[Sentence]]:
    """The tasks and subtasks of every episode's frames; none of an unusable file, which `read_columns` reports."""
    found: dict[int, set[Sentence]] = {}
    tasks = files.sentences("tasks", "task")
    for path in files.data.episodes:
        try:
            file = _open(files, path, Wanted({}, {}, subtask_key, {}, {}))
            codes = _task_numbers(file).tolist()
        except ValueError:
            continue
        try:
            subtasks, _ = _subtasks(files, file, np.ones(len(file.episode), dtype=bool))
        except ValueError:
            subtasks = [None] * len(file.episode)
        for episode, code, subtask in set(zip(file.episode.tolist(), codes, subtasks, strict=True)):
            here = found.setdefault(episode, set())
            here |= {("task", task)} if (task := tasks.get(code)) else set()
            here |= {("subtask", subtask)} if subtask else set()
    return found


def _by_file(files: LeRobotFiles, lengths: dict[int, int], rejects: Rejects) -> dict[Path, dict[int, int]]:
    """{number: frames} of the episodes that each data file holds; those in no file, or in several, are rejects."""
    holders: dict[int, list[Path]] = {episode: [] for episode in lengths}
    for path, inside in files.data.episodes.items():
        for episode in inside.tolist():
            if episode in holders:
                holders[episode].append(path)
    absent = [episode for episode, paths in holders.items() if not paths]
    if absent:
        where, frames = f"episodes {min(absent)} to {max(absent)}", sum(lengths[episode] for episode in absent)
        rejects.add(where, files.absent(absent[0]), "Restore it from its origin", frames)
    found: dict[Path, dict[int, int]] = {}
    for episode, paths in holders.items():
        if len(paths) > 1:
            problem = f"its rows are in more than one file, {' and '.join(map(str, paths))}"
            rejects.add(f"episode {episode}", problem, "Remove the file that is left over", lengths[episode])
        elif paths:
            found.setdefault(paths[0], {})[episode] = lengths[episode]
    return found


def _read_file(
    files: LeRobotFiles, path: Path, lengths: dict[int, int], wanted: Wanted, rejects: Rejects
) -> dict[str, Any]:
    """The rows of the episodes in `lengths`, {number: frames}, by the fields of `Columns`; none of an unusable file.

    Tasks are numbers and subtasks texts; an answer comes with its frame's place among these rows.
    """
    where = f"episodes {min(lengths)} to {max(lengths)}"
    try:
        file = _open(files, path, wanted)
        task = _task_numbers(file)
        widths = wanted.state | wanted.action
        numbers = {key: vectors(file.table.column(key), width, f"{path}, {key}") for key, width in widths.items()}
    except ValueError as error:
        rejects.add(where, str(error), f"Correct {path} or restore it from its origin", sum(lengths.values()))
        return {}
    keep = _complete(file, lengths, files.fps, rejects)
    values = {key: _numbers(file, key, *numbers[key], keep, rejects) for key in widths}
    answers = _answers(file, keep, wanted, files.features, rejects)
    try:
        subtask, subtasks_from = _subtasks(files, file, keep)
    except ValueError as error:
        rejects.add(where, f"{path}, {error}", "Restore it, or name another column as `subtask_key`", 0)
        subtask, subtasks_from = [None] * int(keep.sum()), Counter()
    none = np.empty((int(keep.sum()), 0), np.float32)
    return {
        "file_row": np.flatnonzero(keep),
        "episode": file.episode[keep],
        "frame": file.frame[keep],
        "timestamp": file.timestamp[keep],
        "state": np.concatenate([none, *(values[key] for key in wanted.state)], axis=1),
        "action": np.concatenate([none, *(values[key] for key in wanted.action)], axis=1),
        "task": task[keep],
        "subtask": subtask,
        "subtasks_from": subtasks_from,
        "answers": answers,
    }


def _open(files: LeRobotFiles, path: Path, wanted: Wanted) -> _File:
    """The wanted columns of a file; ValueError for one that is damaged, lacks a column, or has one of another type."""
    with reading_parquet(path, BadFrame):
        schema = pq.read_schema(path)
        present = schema.names
        either = [name for name in (PERSISTENT, SUBTASK_INDEX) if name in present]
        if SUBTASK_INDEX in either and not (files.names_subtasks or is_text(schema.field(SUBTASK_INDEX).type)):
            either.remove(SUBTASK_INDEX)  # `say_how_it_is_read` warns
        subtask_keys = either if wanted.subtask_key is None else [wanted.subtask_key]
        names = {"episode_index", "frame_index", "timestamp", "task_index", *wanted.state, *wanted.action}
        names |= {*subtask_keys} - {PERSISTENT}
        images = {key for key in wanted.cameras if files.features[key]["dtype"] == "image"}
        absent = sorted((names | images | {*subtask_keys}) - set(present))
        if absent:
            raise BadFrame(f"{path} has no columns {absent}")
        for key in images:
            if not holds_images(schema.field(key).type):
                raise BadFrame(f"{path}, {key} holds {schema.field(key).type}, and neither images nor their paths")
        table = pq.read_table(path, columns=sorted(names))
        episode, frame = (
            whole_numbers(table.column(name), f"{path}, {name}") for name in ("episode_index", "frame_index")
        )
        timestamp = real_numbers(table.column("timestamp"), f"{path}, timestamp")
        begins, lengths = runs_of(episode)
        asked = {*subtask_keys} | ({EVENTS} if wanted.answers else set())
        language = [name for name in (PERSISTENT, EVENTS) if name in present and name in asked]
        persistent, events = read_language(path, language, begins) if language else ({}, {})
    runs = list(map(slice, begins.tolist(), (begins + lengths).tolist()))
    return _File(path, table, episode, frame, timestamp, runs, subtask_keys, persistent, events)


def _task_numbers(file: _File) -> np.ndarray:
    """i64[M], -1 where a row has none; ValueError for a column of another type."""
    return whole_numbers(file.table.column("task_index"), f"{file.path}, task_index", null=-1)


def _complete(file: _File, lengths: dict[int, int], fps: float, rejects: Rejects) -> np.ndarray:
    """bool[M]: rows of wanted episodes that have all their frames, in order and in time; the others are rejects.

    Frames that somebody left out, idle ones, leave gaps in `frame_index`: what counts is the rows, as for LeRobot.
    """
    runs: dict[int, list[slice]] = {number: [] for number in lengths}
    for run in file.runs:
        if file.episode[run.start] in runs:
            runs[int(file.episode[run.start])].append(run)
    keep = np.zeros(len(file.episode), dtype=bool)
    for number, parts in runs.items():
        found, remedy = sum(part.stop - part.start for part in parts), f"Restore {file.path} from its origin"
        if found != lengths[number]:
            problem = f"{file.path} has {found} of its {lengths[number]} frames"
        elif len(parts) > 1 or (np.diff(file.frame[parts[0]]) <= 0).any():
            problem = "its frames are out of order"
        else:
            problem = _mistimed(file.timestamp[parts[0]], file.frame[parts[0]], fps)
            remedy = f"Correct fps in meta/info.json, or the timestamps in {file.path}"
        if problem:
            rejects.add(f"episode {number}", problem, remedy, lengths[number])
        else:
            keep[parts[0]] = True
    return keep


def _mistimed(timestamp: np.ndarray, frame: np.ndarray, fps: float) -> str:
    """What is wrong with an episode's timestamps f64[T] in seconds, nothing for those that come at `fps`.

    What counts is the median step, which frames that were left out do not change.  It may be off by a fiftieth, and by
    what it varies where the steps do, as those of a clock that ran beside the robot.
    """
    steps = np.diff(timestamp)
    wrong = np.flatnonzero(~(steps > 0)) if np.isfinite(timestamp[0]) else np.array([-1])
    if len(wrong):
        before, here = timestamp[wrong[0]], timestamp[wrong[0] + 1]
        order = f", after {before:.6g} s" if wrong[0] >= 0 else ""
        return f"its timestamps do not increase: frame {frame[wrong[0] + 1]} is at {here:.6g} s{order}"
    if not len(steps):
        return ""
    step = float(np.median(steps))
    jitter = 3 * float(np.median(np.abs(steps - step))) / np.sqrt(len(steps))
    if abs(step - 1 / fps) <= 0.02 / fps + jitter:
        return ""
    return f"its timestamps come at {1 / step:.6g} a second, and fps in meta/info.json is {fps:g}"


def _numbers(
    file: _File, key: str, values: np.ndarray, sizes: np.ndarray, keep: np.ndarray, rejects: Rejects
) -> np.ndarray:
    """A feature's kept rows, f32[N width]. Rows of another width are NaN: their frames are left out with NaN's."""
    width = values.shape[1]
    wrong = np.flatnonzero((sizes != width) & keep)
    if len(wrong):
        problem = f"{sizes[wrong[0]]} values where meta/info.json says {width}"
        rejects.add(f"{file.address(wrong[0])}, {key}", problem, f"Correct the shape or {file.path}", 0)
    return values[keep]


def _answers(
    file: _File, keep: np.ndarray, wanted: Wanted, features: Collection[str], rejects: Rejects
) -> list[tuple[int, Answer]]:
    """Answers by their frame's place among the kept rows."""
    answers: list[tuple[int, Answer]] = []
    place = np.cumsum(keep) - 1
    for row, rows in file.events.items():
        if keep[row]:
            try:
                found = question_answers(rows, wanted.cameras, wanted.box_range, features)
                answers += [(int(place[row]), answer) for answer in found]
            except ValueError as error:
                rejects.add(f"{file.address(row)}, {EVENTS}", str(error), f"Correct {file.path}", 0)
    return answers


def _subtasks(files: LeRobotFiles, file: _File, keep: np.ndarray) -> tuple[list[str | None], Counter[str]]:
    """The kept rows' subtasks, and how many episodes have theirs from which column.

    An episode's are in the first column that holds any for it.  ValueError, with the column, for one that holds
    neither texts nor numbers that stand for some.
    """
    texts: list[str | None] = []
    found_in: Counter[str] = Counter()
    columns: dict[str, list[str | None]] = {}
    for run in file.runs:
        if not keep[run.start]:
            continue
        here: list[str | None] = [None] * (run.stop - run.start)
        for key in file.subtask_keys:
            if key == PERSISTENT:
                here = active_subtasks(file.persistent.get(run.start, []), file.timestamp[run])
            else:
                if key not in columns:
                    columns[key] = _subtask_texts(files, file.table.column(key), key, keep)
                here = columns[key][run]
            if any(here):
                found_in[key] += 1
                break
        texts += here
    return texts, found_in


def _subtask_texts(files: LeRobotFiles, column: pa.ChunkedArray, key: str, keep: np.ndarray) -> list[str | None]:
    """A column of texts, or of numbers of sentences in meta/subtasks.parquet, as texts. The kept rows are checked."""
    if is_text(column.type):
        return column.cast(pa.string()).to_pylist()
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    numbers = real_numbers(column, key) if pa.types.is_primitive(kind) else np.array([0.5])
    if not (np.isnan(numbers) | (numbers == np.round(numbers))).all():
        raise ValueError(f"{key}: it holds {column.type}: a subtask is text, or a number as in subtask_index")
    sentences = files.sentences("subtasks", "subtask")
    if not sentences and (numbers >= 0).any():
        raise ValueError(
            f"{key}: it numbers subtasks, and meta/subtasks.parquet, which names them, is missing (after a merge none"
            " fits: each part had its own numbers)"
        )
    used = np.unique(numbers[keep & (numbers >= 0)]).astype(int).tolist()
    unknown = [number for number in used if number not in sentences]
    if unknown:
        raise ValueError(f"{key}: meta/subtasks.parquet has no sentence for {unknown}")
    return [sentences.get(number) for number in numbers.tolist()]


def _concatenate(files: LeRobotFiles, paths: list[Path], parts: list[dict[str, Any]], wanted: Wanted) -> Columns:
    def joined(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([part[name] for part in parts] or [empty])

    none = np.empty(0, np.int64)
    episode = joined("episode", none)
    begins, lengths = runs_of(episode)
    sizes = [len(part["episode"]) for part in parts]
    starts = np.cumsum([0, *sizes])
    return Columns(
        files=paths,
        file=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        file_row=joined("file_row", none),
        episode=episode,
        frame=joined("frame", none),
        timestamp=joined("timestamp", np.empty(0)),
        end=np.repeat(begins + lengths, lengths),
        state=joined("state", np.empty((0, sum(wanted.state.values())), np.float32)),
        action=joined("action", np.empty((0, sum(wanted.action.values())), np.float32)),
        task=TextColumn.of_codes(joined("task", none), files.sentences("tasks", "task")),
        subtask=TextColumn.of_texts(text for part in parts for text in part["subtask"]),
        answers=AnswerColumn.build(
            (int(start) + row, answer)
            for start, part in zip(starts, parts, strict=False)
            for row, answer in part["answers"]
        ),
        subtasks_from=sum((part["subtasks_from"] for part in parts), Counter()),
    )
