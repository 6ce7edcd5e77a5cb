"""Images with text, captions or questions with answers, read through Hugging Face `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    """A dataset of single images with text."""

    path: str
    """A folder written by `save_to_disk`, a parquet or JSON-lines file or a folder of them, or a Hub id."""
    kind: Literal["web_caption", "qa"] = "web_caption"
    """What its texts are: captions, or answers to questions."""
    image_column: str = "image"
    """Images: encoded, as `datasets` stores them, or paths relative to the dataset's folder."""
    caption_column: str = "caption"
    """Captions; for web_caption."""
    question_column: str = "question"
    """Questions, or a list of them; for qa."""
    answer_column: str = "answer"
    """Answers, or a list of them, one for each question; for qa."""
    caption_prompt: str = "caption"
    """What the model is asked for when it is to say the caption."""
    camera: str = "image"
    """Camera name that the images get."""
    camera_column: str | None = None
    """Column with each image's camera name, where they differ."""
    val_fraction: float = 0.1
    """Share of rows held out where the dataset has no validation split; 0 holds out none."""
    group_column: str | None = None
    """Column whose equal values stay on one side of the split, such as the image's number."""
    on_bad_sample: OnBadSample = "error"
    """Whether a row that cannot be trained on stops the run or is left out, counted and logged."""

    def open(self, name: str, split: Split, shapes: Shapes) -> VisionTextSource:
        """Raises ValueError for a wrong configuration and BadSample for bad data, unless that is to be skipped."""
        return VisionTextSource(self, name, split)


class VisionTextSource:
    """One frame per row: an image under its camera's name, and what can be asked about it."""

    def __init__(self, config: VisionTextConfig, name: str, split: Split):
        self.config, self.name = config, name
        self.rejects = Rejects(name, config.on_bad_sample)
        self._data, chosen = self._split(_load(config.path), split)
        self._rows = np.flatnonzero(chosen)
        self._reject_texts()
        if config.camera_column is None:
            self.camera_names = [config.camera]
        else:
            self.camera_names = sorted(self._data.unique(config.camera_column))
        local = Path(config.path).expanduser()
        self._folder = local.parent if local.is_file() else local

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Frame:
        row = self._data[int(self._rows[index])]
        camera = row[self.config.camera_column] if self.config.camera_column else self.config.camera
        try:
            image = self._image(row[self.config.image_column])
        except BadImage as error:
            where = f"{self.address(index)}, {self.config.image_column}"
            raise BadSample(f"{where}: {error}. Restore the image or drop the row") from error
        return Frame(images={camera: image}, answers=self._answers(row, camera))

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: every row as the configured kind, none as anything else."""
        return np.arange(len(self)) if modality == self.config.kind else np.empty(0, np.int64)

    def address(self, index: int) -> str:
        """The row in words: "dataset 'x', row 17"."""
        return f"dataset {self.name!r}, row {self._rows[index]}"

    def prepare(self) -> None:
        """Nothing: `datasets` prepared the data when it was opened."""

    def _split(self, parts: dict[str, datasets.Dataset], split: Split) -> tuple[datasets.Dataset, np.ndarray]:
        """The rows' dataset, and which of its rows belong to the split."""
        named = next((name for name in _VALIDATION_PARTS if name in parts), None)
        others = [name for name in parts if name != named]
        if named is not None and others:
            data = self._select(parts[named if split == "val" else others[0]])
            return data, np.ones(len(data), dtype=bool)
        (whole, *_) = parts.values()
        data, fraction, group = self._select(whole), self.config.val_fraction, self.config.group_column
        in_val = held_out(np.arange(len(data)), fraction) if group is None else held_out_groups(data[group], fraction)
        return data, in_val if split == "val" else ~in_val

    @property
    def _text_columns(self) -> list[str]:
        config = self.config
        return (
            [config.caption_column] if config.kind == "web_caption" else [config.question_column, config.answer_column]
        )

    def _select(self, data: datasets.Dataset) -> datasets.Dataset:
        config = self.config
        optional = [column for column in (config.camera_column, config.group_column) if column]
        wanted = [config.image_column, *self._text_columns, *optional]
        absent = sorted(set(wanted) - set(data.column_names))
        if absent:
            raise ValueError(
                f"dataset {self.name!r} has no columns {absent} for {config.kind}; it has {data.column_names}: "
                "say which of them hold what"
            )
        return data.select_columns(wanted).cast_column(config.image_column, datasets.Image(decode=False))

    def _reject_texts(self) -> None:
        texts = {column: self._data[column][:] for column in self._text_columns}
        problems = [_text_problem({column: texts[column][row] for column in texts}) for row in self._rows]
        bad = np.array([problem is not None for problem in problems], dtype=bool)
        if bad.any():
            first = int(np.argmax(bad))
            where = f"row {self._rows[first]}"
            self.rejects.add(where, f"{problems[first]}", "Drop the row or give it its text", int(bad.sum()))
            self._rows = self._rows[~bad]

    def _image(self, stored: dict[str, Any] | None) -> np.ndarray:
        if stored is None or not (stored["bytes"] or stored["path"]):
            raise BadImage("no image is stored for this row")
        return read_image(stored["bytes"] or self._folder / stored["path"])

    def _answers(self, row: dict[str, Any], camera: str) -> tuple[Answer, ...]:
        config = self.config
        if config.kind == "web_caption":
            return (Answer(config.caption_prompt, row[config.caption_column].strip(), camera),)
        questions, answers = _texts(row[config.question_column]), _texts(row[config.answer_column])
        return tuple(Answer(q.strip(), a.strip(), camera) for q, a in zip(questions, answers, strict=True))


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
    return value if isinstance(value, list) else [value or ""]


def _text_problem(row: dict[str, str | list[str] | None]) -> str | None:
    """What is wrong with a row's texts: an empty one, or questions and answers that differ in number."""
    lengths = {column: len(_texts(value)) for column, value in row.items()}
    if len(set(lengths.values())) > 1:
        return f"the columns hold different numbers of texts, {lengths}"
    if 0 in lengths.values():
        return "it has no text"
    return next((f"{column} is empty" for column, value in row.items() for t in _texts(value) if not t.strip()), None)
