"""What LeRobot's language columns say about frames: the subtask of the moment, and questions with their answers.

`language_persistent` repeats an episode's whole list of rows on each of its frames, so it is read once per episode;
`language_events` holds the rows of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pi05_lightning.data.boxes import from_lerobot
from pi05_lightning.data.places import misplaced
from pi05_lightning.types import Answer

PERSISTENT = "language_persistent"
EVENTS = "language_events"
SUBTASK_INDEX = "subtask_index"
_FIELDS = {PERSISTENT: {"style", "content", "timestamp"}, EVENTS: {"style", "role", "content", "camera"}}
_BATCH_ROWS = 4096  # bounds memory: a persistent row repeats all of its episode's text
_TIME_TOLERANCE = 1e-4  # seconds, LeRobot's own: timestamps are float32 in one column and may be float64 in the other


def read_language(
    path: Path, columns: list[str], first_rows: np.ndarray
) -> tuple[dict[int, list[dict]], dict[int, list[dict]]]:
    """The language rows of one data file, by row in that file.

    first_rows: i64, ascending, the first row of each episode.  Returns (persistent rows by an episode's first row,
    event rows by frame); a column that is not in `columns` gives nothing.  ValueError for one of another type.
    """
    persistent: dict[int, list[dict]] = {}
    events: dict[int, list[dict]] = {}
    schema = pq.read_schema(path)
    for name in columns:
        rows = getattr(schema.field(name).type, "value_type", None)
        absent = _FIELDS[name] - ({field.name for field in rows} if rows and pa.types.is_struct(rows) else set())
        if absent and not pa.types.is_null(schema.field(name).type):
            raise ValueError(f"{path}, {name} holds {schema.field(name).type}, which lacks {sorted(absent)}")
    columns = [name for name in columns if not pa.types.is_null(schema.field(name).type)]
    start = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        stop = start + batch.num_rows
        if PERSISTENT in columns:
            rows = first_rows[(first_rows >= start) & (first_rows < stop)]
            values = batch.column(PERSISTENT).take(pa.array(rows - start))
            persistent.update((row, value or []) for row, value in zip(rows.tolist(), values.to_pylist(), strict=True))
        if EVENTS in columns:
            lengths = pc.fill_null(pc.list_value_length(batch.column(EVENTS)), 0).to_numpy(zero_copy_only=False)
            here = np.flatnonzero(lengths)
            values = batch.column(EVENTS).take(pa.array(here))
            events.update(zip((here + start).tolist(), values.to_pylist(), strict=True))
        start = stop
    return persistent, events


def active_subtasks(rows: Iterable[dict], timestamps: np.ndarray) -> list[str | None]:
    """The subtask active at each timestamp of an episode: the last one that began by then, None before the first.

    ValueError for one that does not say when it begins.
    """
    changes = [row for row in rows if row["style"] == "subtask" and row["content"] and row["content"].strip()]
    if any(row["timestamp"] is None for row in changes):
        raise ValueError(f"{PERSISTENT}: a subtask has no timestamp")
    changes.sort(key=lambda row: row["timestamp"])
    began = np.array([row["timestamp"] for row in changes], dtype=np.float32)
    which = np.searchsorted(began, timestamps.astype(np.float32) + np.float32(_TIME_TOLERANCE), side="right") - 1
    return [changes[i]["content"] if i >= 0 else None for i in which]


def question_answers(
    rows: Iterable[dict], cameras: dict[str, str], sizes: dict[str, tuple[float, float]], features: Collection[str]
) -> list[Answer]:
    """The visual questions of one frame: the k-th `vqa` question about a camera goes with its k-th answer.

    cameras: feature key -> name; questions about other cameras are left out.  sizes: feature key -> (height, width),
    in the units of the boxes.  features: keys of all that the dataset has.  Raises ValueError when questions and
    answers do not pair up, one is empty or about no feature, a box is outside its image, or nothing tells how large
    that is.
    """
    questions: dict[str | None, list[str]] = {}
    answers: dict[str | None, list[str]] = {}
    for row in rows:
        if row["style"] == "vqa":
            spoken = questions if row["role"] == "user" else answers
            spoken.setdefault(row["camera"], []).append(row["content"] or "")
    found = []
    for key in questions | answers:
        asked, told = questions.get(key, []), answers.get(key, [])
        if len(asked) != len(told):
            raise ValueError(f"{len(asked)} vqa questions about camera {key!r} but {len(told)} answers")
        if key is not None and key not in features:
            raise ValueError(f"a vqa question is about the camera {key!r}, and meta/info.json has no such feature")
        if key is None or key in cameras:
            camera = None if key is None else cameras[key]
            about = set(sizes.values()) if key is None else {sizes[key]}
            for question, answer in zip(asked, (_spelled(answer, about) for answer in told), strict=True):
                if not (question.strip() and answer.strip()):
                    raise ValueError("a vqa question or answer is empty")
                if problem := misplaced(question) or misplaced(answer):
                    raise ValueError(problem)
                found.append(Answer(question, answer, camera))
    return found


def _spelled(answer: str, sizes: set[tuple[float, float]]) -> str:
    """`from_lerobot` of an answer about images of these sizes; ValueError for a place where they are not one size."""
    spelled = from_lerobot(answer, *(next(iter(sizes)) if len(sizes) == 1 else (math.inf, math.inf)))
    if len(sizes) != 1 and "<loc" in spelled and spelled != answer:
        raise ValueError(f"{answer!r} is a place of no camera, and the cameras differ in size: say which camera's")
    return spelled


@dataclass(frozen=True)
class TextColumn:
    """Text per row, repeated text stored once: `column[row]` is a string, or None where there is none."""

    values: list[str]
    codes: np.ndarray  # i32[N], index into values, -1 for none

    @classmethod
    def of_texts(cls, texts: Iterable[str | None]) -> TextColumn:
        filled = [text if text and text.strip() else None for text in texts]
        encoded = pa.array(filled, type=pa.string()).dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        return cls(encoded.dictionary.to_pylist(), codes.astype(np.int32))

    @classmethod
    def of_codes(cls, codes: np.ndarray, sentences: dict[int, str]) -> TextColumn:
        """Numbers that stand for sentences; those without one, or with an empty one, become none."""
        known, inverse = np.unique(codes, return_inverse=True)
        return cls.of_texts(sentences.get(int(code)) for code in known).take(inverse)

    def take(self, rows: np.ndarray) -> TextColumn:
        return TextColumn(self.values, self.codes[rows])

    def filled(self, text: str) -> TextColumn:
        """The same with `text` where there was none."""
        return TextColumn([*self.values, text], np.where(self.codes < 0, len(self.values), self.codes).astype(np.int32))

    def characters(self, rows: np.ndarray) -> np.ndarray:
        """i64: how long the rows' texts are, 0 for none."""
        return np.array([*map(len, self.values), 0], dtype=np.int64)[self.codes[rows]]

    def __getitem__(self, row: int) -> str | None:
        code = self.codes[row]
        return self.values[code] if code >= 0 else None


@dataclass(frozen=True)
class AnswerColumn:
    """Answers per row, kept as columns: several hundred thousand would be slow to fork as Python objects."""

    rows: np.ndarray  # i64[M], ascending, the frame of each answer
    table: pa.Table  # M rows of question, answer, camera

    @classmethod
    def build(cls, answers: Iterable[tuple[int, Answer]]) -> AnswerColumn:
        pairs = sorted(answers, key=lambda pair: pair[0])
        schema = pa.schema({"question": pa.string(), "answer": pa.string(), "camera": pa.string()})
        table = pa.Table.from_pylist([vars(answer) for _, answer in pairs], schema=schema)
        return cls(np.array([row for row, _ in pairs], dtype=np.int64), table)

    def characters(self, rows: np.ndarray) -> np.ndarray:
        """i64: how long the rows' questions and answers are together."""
        each = pc.add(pc.utf8_length(self.table["question"]), pc.utf8_length(self.table["answer"]))
        until = np.concatenate([[0], np.cumsum(each.to_numpy())]).astype(np.int64)
        return until[np.searchsorted(self.rows, rows, "right")] - until[np.searchsorted(self.rows, rows)]

    def __getitem__(self, row: int) -> tuple[Answer, ...]:
        start, stop = np.searchsorted(self.rows, [row, row + 1])
        if start == stop:
            return ()
        return tuple(Answer(**values) for values in self.table.slice(start, stop - start).to_pylist())
