"""Images with captions, and with questions and answers, read through Hugging Face `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from pi05_lightning.data.errors import BadImage, BadSample, OnBadSample, Rejects
from pi05_lightning.data.images import read_image
from pi05_lightning.data.sources.base import SourceConfig, Split
from pi05_lightning.data.sources.split import held_out, held_out_groups
from pi05_lightning.types import Answer, Frame, Modality, Shapes

_VALIDATION_PARTS = ("validation", "val", "test")


@dataclass(frozen=True)
class VisionTextConfig(SourceConfig):
    """A dataset of single images with text. Of the columns below it may lack captions, questions or cameras."""

    path: str
    """A folder written by `save_to_disk`, a parquet or JSON-lines file or a folder of them, or a Hub id."""
    image_column: str = "image"
    """Images: encoded, as `datasets` stores them, or paths relative to the dataset's folder."""
    caption_column: str = "caption"
    """Captions, for web_caption."""
    question_column: str = "question"
    """Questions, or a list of them, for qa."""
    answer_column: str = "answer"
    """Answers, or a list of them, one for each question, for qa."""
    camera_column: str = "camera"
    """Each image's camera name."""
    camera: str = "image"
    """Camera name of all images, where there is no such column."""
    caption_prompt: str = "caption"
    """What the model is asked when it is to say the caption."""
    val_fraction: float = 0.1
    """Share of rows held out where the dataset has no validation part; 0 holds out none."""
    group_column: str | None = None
    """Column whose equal values stay on one side of that split, such as the number of the scene."""
    on_bad_sample: OnBadSample = "error"
    """Whether a row that cannot be trained on stops the run or is left out, counted and logged."""

    def open(self, name: str, split: Split, shapes: Shapes) -> VisionTextSource:
        """Raises ValueError for a wrong configuration and BadSample for bad data, unless that is to be skipped."""
        return VisionTextSource(self, name, split)


class VisionTextSource:
    """One frame per image and kind of text: first all with a caption to give, then all with questions to answer."""

    def __init__(self, config: VisionTextConfig, name: str, split: Split):
        self.config, self.name = config, name
        self.rejects = Rejects(name, config.on_bad_sample)
        self._data, rows = self._part(_load(config.path), split)
        self._has_camera = config.camera_column in self._data.column_names
        self._captioned, self._asked = self._with_text(rows)
        self.camera_names = sorted(self._data.unique(config.camera_column)) if self._has_camera else [config.camera]
        local = Path(config.path).expanduser()
        self._folder = local.parent if local.is_file() else local

    def __len__(self) -> int:
        return len(self._captioned) + len(self._asked)

    def __getitem__(self, index: int) -> Frame:
        config, row = self.config, self._data[self._row(index)]
        camera = row[config.camera_column] if self._has_camera else config.camera
        try:
            image = self._image(row[config.image_column])
        except BadImage as error:
            where = f"{self.address(index)}, {config.image_column}"
            raise BadSample(f"{where}: {error}. Restore the image or drop the row") from error
        if index < len(self._captioned):
            pairs = [(config.caption_prompt, row[config.caption_column])]
        else:
            pairs = list(zip(_texts(row[config.question_column]), _texts(row[config.answer_column]), strict=True))
        answers = tuple(Answer(question.strip(), answer.strip(), camera) for question, answer in pairs)
        return Frame(images={camera: image}, answers=answers)

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: frames with a caption (web_caption), with questions (qa)."""
        match modality:
            case Modality.WEB_CAPTION:
                return np.arange(len(self._captioned))
            case Modality.QA:
                return np.arange(len(self._captioned), len(self))
            case _:
                return np.empty(0, dtype=np.int64)

    def address(self, index: int) -> str:
        """The frame in words: "dataset 'x', row 17"."""
        return f"dataset {self.name!r}, row {self._row(index)}"

    def prepare(self) -> None:
        """Nothing: `datasets` prepared the data when it was opened."""

    def _row(self, index: int) -> int:
        captions = len(self._captioned)
        return int(self._captioned[index] if index < captions else self._asked[index - captions])

    def _part(self, parts: dict[str, datasets.Dataset], split: Split) -> tuple[datasets.Dataset, np.ndarray]:
        """The dataset to read for the split, and its rows i64 that belong to it."""
        named = next((name for name in _VALIDATION_PARTS if name in parts), None)
        others = [name for name in parts if name != named]
        if named is not None and others:
            data = self._select(parts[named if split == "val" else others[0]])
            return data, np.arange(len(data))
        (whole, *_) = parts.values()
        data, fraction, group = self._select(whole), self.config.val_fraction, self.config.group_column
        in_val = held_out(np.arange(len(data)), fraction) if group is None else held_out_groups(data[group], fraction)
        return data, np.flatnonzero(in_val if split == "val" else ~in_val)

    def _select(self, data: datasets.Dataset) -> datasets.Dataset:
        config, present = self.config, data.column_names
        texts = [[config.caption_column], [config.question_column, config.answer_column]]
        kinds = [columns for columns in texts if set(columns) <= set(present)]
        needed = [config.image_column, *([config.group_column] if config.group_column else [])]
        absent = sorted(set(needed) - set(present))
        if absent or not kinds:
            raise ValueError(
                f"dataset {self.name!r} has no {absent or 'captions, nor questions with answers'}; its columns are "
                f"{present}: say which of them hold what"
            )
        wanted = {
            *needed,
            *(column for columns in kinds for column in columns),
            *({config.camera_column} & set(present)),
        }
        return data.select_columns(sorted(wanted)).cast_column(config.image_column, datasets.Image(decode=False))

    def _with_text(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows, i64, with a caption, and with questions; what has neither, or a blank text, is rejected."""
        config = self.config
        names = [config.caption_column, config.question_column, config.answer_column]
        columns = [self._data[name][:] if name in self._data.column_names else None for name in names]
        captioned, asked, problems = [], [], {}
        for row in rows.tolist():
            captions, questions, answers = (_texts(column[row]) if column else [] for column in columns)
            blank = [text for text in (*captions, *questions, *answers) if not text.strip()]
            if blank or not (captions or questions):
                problems[row] = "a text is empty" if blank else "it has neither caption nor question"
            elif len(questions) != len(answers):
                problems[row] = f"{len(questions)} questions but {len(answers)} answers"
            else:
                captioned += [row] * bool(captions)
                asked += [row] * bool(questions)
        if problems:
            first = next(iter(problems))
            self.rejects.add(f"row {first}", problems[first], "Drop the row or give it its text", len(problems))
        return np.array(captioned, dtype=np.int64), np.array(asked, dtype=np.int64)

    def _image(self, stored: dict[str, Any] | None) -> np.ndarray:
        if stored is None or not (stored["bytes"] or stored["path"]):
            raise BadImage("no image is stored for this row")
        return read_image(stored["bytes"] or self._folder / stored["path"])


def _load(path: str) -> dict[str, datasets.Dataset]:
    """The dataset's parts by name; one that is not divided is all "train". Raises ValueError naming the path."""
    local = Path(path).expanduser()
    try:
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            found = datasets.load_from_disk(local)
        elif local.exists():
            found = _load_files(local)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            found = datasets.load_dataset(path)
        else:
            raise ValueError(f"{path}: no such file or folder. Name one, or a Hub id as owner/name.")
    except (pa.ArrowException, OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path} cannot be read ({reason}): restore it from its origin") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _load_files(local: Path) -> datasets.Dataset:
    candidates = [local] if local.is_file() else sorted(local.rglob("*"))
    for suffix, read in ((".parquet", datasets.Dataset.from_parquet), (".jsonl", datasets.Dataset.from_json)):
        files = [str(file) for file in candidates if file.suffix == suffix]
        if files:
            return read(files)
    raise ValueError(f"{local} holds neither a dataset saved by `datasets` nor parquet or .jsonl files")


def _texts(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]
