"""A LeRobot dataset's numbers and texts, read once, file by file, into arrays over the frames of chosen episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.errors import BadFrame, Rejects
from pi05_lightning.data.lerobot_files import LeRobotFiles, Sentence, vectors
from pi05_lightning.data.sources.language import (
    EVENTS,
    PERSISTENT,
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
    """

    state: dict[str, int]
    action: dict[str, int]
    subtask_key: str | None
    cameras: dict[str, str]
    box_range: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Columns:
    """N frames in the dataset's order.

    episode, frame i64[N];  timestamp f64[N], from the episode's start;  end i64[N]: the row where the frame's episode
    ends;  file i32[N], into files, and file_row i64[N] in it;  state f32[N S], action f32[N A].
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

    def address(self, row: int) -> str:
        return f"episode {self.episode[row]}, frame {self.frame[row]}"


@dataclass(frozen=True)
class _File:
    """One data file, M rows.

    begins: i64, the rows where an episode begins.  persistent, events: its language rows, see `read_language`.
    """

    path: Path
    table: pa.Table
    episode: np.ndarray
    frame: np.ndarray
    timestamp: np.ndarray
    begins: np.ndarray
    subtask_key: str | None
    persistent: dict[int, list[dict]]
    events: dict[int, list[dict]]

    def address(self, row: int) -> str:
        return f"episode {self.episode[row]}, frame {self.frame[row]}"


def read_columns(files: LeRobotFiles, episodes: np.ndarray, wanted: Wanted, rejects: Rejects) -> Columns:
    """The rows of chosen episodes. Unreadable files, and episodes that are empty or incomplete, are rejects."""
    place = np.searchsorted(files.column("episode_index"), episodes)
    length = files.column("length")[place]
    for episode in episodes[length == 0]:
        rejects.add(f"episode {episode}", "it has no frames", "Leave it out with `episodes`", 0)
    location = np.stack([files.column(f"data/{part}_index")[place] for part in ("chunk", "file")], axis=1)
    paths, parts = [], []
    for number in np.unique(location[length > 0], axis=0):
        inside = (location == number).all(axis=1) & (length > 0)
        path = files.data_path(*number)
        part = _read_file(files, path, dict(zip(episodes[inside], length[inside], strict=True)), wanted, rejects)
        if part:
            paths.append(path)
            parts.append(part)
    return _concatenate(files, paths, parts, wanted)


def sentences_of_episodes(files: LeRobotFiles, subtask_key: str | None) -> dict[int, set[Sentence]]:
    """The tasks and subtasks of every episode's frames; none of an unusable file, which `read_columns` reports."""
    found: dict[int, set[Sentence]] = {}
    tasks = files.sentences("tasks", "task")
    numbers = np.stack([files.column(f"data/{part}_index") for part in ("chunk", "file")], axis=1)
    for number in np.unique(numbers[files.column("length") > 0], axis=0):
        try:
            file = _open(files, files.data_path(*number), Wanted({}, {}, subtask_key, {}, {}))
        except BadFrame:
            continue
        try:
            subtasks = _subtasks(files, file, np.ones(len(file.episode), dtype=bool))
        except ValueError:
            subtasks = [None] * len(file.episode)
        codes = file.table.column("task_index").to_numpy().tolist()
        for episode, code, subtask in set(zip(file.episode.tolist(), codes, subtasks, strict=True)):
            here = found.setdefault(episode, set())
            here |= {("task", task)} if (task := tasks.get(code)) else set()
            here |= {("subtask", subtask)} if subtask else set()
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
    except BadFrame as error:
        rejects.add(where, str(error), f"Restore {path} from its origin", sum(lengths.values()))
        return {}
    keep = _complete(file, lengths, rejects)
    numbers = {key: _numbers(file, key, width, keep, rejects) for key, width in (wanted.state | wanted.action).items()}
    answers = _answers(file, keep, wanted, rejects)
    kept = int(keep.sum())
    try:
        subtask = _subtasks(files, file, keep)
    except ValueError as error:
        problem, remedy = str(error), "Restore it, or name another column as `subtask_key`"
        rejects.add(f"{where}, {file.subtask_key}", problem, remedy, 0)
        subtask = [None] * kept
    none = np.empty((kept, 0), np.float32)
    return {
        "file_row": np.flatnonzero(keep),
        "episode": file.episode[keep].astype(np.int64),
        "frame": file.frame[keep].astype(np.int64),
        "timestamp": file.timestamp[keep],
        "state": np.concatenate([none, *(numbers[key] for key in wanted.state)], axis=1),
        "action": np.concatenate([none, *(numbers[key] for key in wanted.action)], axis=1),
        "task": file.table.column("task_index").to_numpy()[keep],
        "subtask": subtask,
        "answers": answers,
    }


def _open(files: LeRobotFiles, path: Path, wanted: Wanted) -> _File:
    """The wanted columns of a file; raises BadFrame for one that is missing, damaged, or lacks a column."""
    try:
        present = pq.read_schema(path).names
        found = (name for name in (PERSISTENT, "subtask_index") if name in present)
        subtask_key = next(found, None) if wanted.subtask_key is None else wanted.subtask_key
        names = {"episode_index", "frame_index", "timestamp", "task_index", *wanted.state, *wanted.action}
        if subtask_key not in (None, PERSISTENT):
            names.add(subtask_key)
        images = {key for key in wanted.cameras if files.features[key]["dtype"] == "image"}
        absent = sorted((names | images) - set(present))
        if absent:
            raise BadFrame(f"{path} has no columns {absent}")
        table = pq.read_table(path, columns=sorted(names))
        episode = table.column("episode_index").to_numpy()
        begins = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
        language = [name for name in (PERSISTENT, EVENTS) if name in present and name in (EVENTS, subtask_key)]
        persistent, events = read_language(path, language, begins) if language else ({}, {})
    except FileNotFoundError as error:
        raise BadFrame(f"{path} is missing") from error
    except (pa.ArrowException, OSError) as error:
        raise BadFrame(f"{path} is damaged ({error})") from error
    frame, timestamp = table.column("frame_index").to_numpy(), table.column("timestamp").to_numpy().astype(np.float64)
    return _File(path, table, episode, frame, timestamp, begins, subtask_key, persistent, events)


def _complete(file: _File, lengths: dict[int, int], rejects: Rejects) -> np.ndarray:
    """bool[M]: rows of wanted episodes that have all their frames, in order; the others are rejects."""
    rows_before = np.repeat(file.begins, np.diff(file.begins, append=len(file.frame)))
    in_order = file.frame == np.arange(len(file.frame)) - rows_before
    keep = np.isin(file.episode, list(lengths))
    for number, length in lengths.items():
        rows = file.episode == number
        problem = None
        if rows.sum() != length:
            problem = f"{file.path} has {rows.sum()} of its {length} frames"
        elif not in_order[rows].all():
            problem = "its frames are out of order"
        if problem:
            rejects.add(f"episode {number}", problem, f"Restore {file.path} from its origin", length)
            keep &= ~rows
    return keep


def _numbers(file: _File, key: str, width: int, keep: np.ndarray, rejects: Rejects) -> np.ndarray:
    """A feature's kept rows, f32[N width]. Rows of another width are NaN: their frames are left out with NaN's."""
    values, sizes = vectors(file.table, key, width)
    wrong = np.flatnonzero((sizes != width) & keep)
    if len(wrong):
        problem = f"{sizes[wrong[0]]} values where meta/info.json says {width}"
        rejects.add(f"{file.address(wrong[0])}, {key}", problem, f"Correct the shape or {file.path}", 0)
    return values[keep]


def _answers(file: _File, keep: np.ndarray, wanted: Wanted, rejects: Rejects) -> list[tuple[int, Answer]]:
    """Answers by their frame's place among the kept rows."""
    answers: list[tuple[int, Answer]] = []
    place = np.cumsum(keep) - 1
    for row, rows in file.events.items():
        if keep[row]:
            try:
                found = question_answers(rows, wanted.cameras, wanted.box_range)
                answers += [(int(place[row]), answer) for answer in found]
            except ValueError as error:
                rejects.add(f"{file.address(row)}, {EVENTS}", str(error), f"Correct {file.path}", 0)
    return answers


def _subtasks(files: LeRobotFiles, file: _File, keep: np.ndarray) -> list[str | None]:
    """The kept rows' subtasks; ValueError for a column that holds neither texts nor numbers that stand for some."""
    key = file.subtask_key
    if key is None:
        return [None] * int(keep.sum())
    if key == PERSISTENT:
        ends = np.append(file.begins[1:], len(file.timestamp))
        texts: list[str | None] = []
        for begin, end in zip(file.begins, ends, strict=True):
            if keep[begin]:
                texts += active_subtasks(file.persistent[begin], file.timestamp[begin:end])
        return texts
    column = file.table.column(key)
    if pa.types.is_integer(column.type):
        sentences = files.sentences("subtasks", "subtask")
        if not sentences:
            raise ValueError("it numbers subtasks, and meta/subtasks.parquet, which names them, is missing")
        return [sentences.get(code) for code in column.filter(keep).to_pylist()]
    text = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(is_text(text) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise ValueError(f"it holds {column.type}: a subtask is text, or a number as in subtask_index")
    return column.cast(pa.string()).filter(keep).to_pylist()


def _concatenate(files: LeRobotFiles, paths: list[Path], parts: list[dict[str, Any]], wanted: Wanted) -> Columns:
    def joined(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([part[name] for part in parts] or [empty])

    none = np.empty(0, np.int64)
    episode = joined("episode", none)
    begins = np.flatnonzero(np.diff(episode, prepend=-1))
    lengths = np.diff(begins, append=len(episode))
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
    )
