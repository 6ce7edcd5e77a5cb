"""Images with captions, questions and answers, and boxes, read through Hugging Face `datasets`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, ClassVar, cast

import datasets
import numpy as np
import pyarrow as pa

from pi05_lightning.data.boxes import BoxOrder, detections, to_box
from pi05_lightning.data.errors import BadImage, BadSample, OnBadSample, Rejects
from pi05_lightning.data.images import read_stored
from pi05_lightning.data.places import misplaced
from pi05_lightning.data.prompt import fields_of
from pi05_lightning.data.sources.base import Sizes, Source, SourceConfig
from pi05_lightning.data.sources.part_files import files_by_part
from pi05_lightning.data.split import Split, check_fraction, held_out, named_parts
from pi05_lightning.files.hub import is_hub_id, split_revision
from pi05_lightning.files.local import shown
from pi05_lightning.files.ranges import check_range
from pi05_lightning.types import Answer, Frame, Modality, Shapes

_DatasetError = datasets.exceptions.DatasetGenerationError
_SHUFFLE_BUFFER = 1000  # rows read ahead of a stream, to mix those of a file
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionTextConfig(SourceConfig):
    """A dataset of single images with text. It may lack any of the columns below but the images."""

    splits: ClassVar[tuple[Split, ...]] = ("train", "val", "test")

    path: str
    """A folder written by `save_to_disk`, a parquet, Arrow or JSON-lines file or a folder of them, or a Hub id, which
    may end with @ and a branch, a tag or a commit."""
    subset: str | None = None
    """Which of a Hub dataset's configurations."""
    stream_rows: int | None = None
    """Read this many rows of each part, from files in random order, and keep them, instead of fetching all of it."""
    image_column: str = "image"
    """Images: encoded, as `datasets` stores them, or paths relative to the dataset's folder."""
    caption_column: str = "caption"
    """Captions, one or a list of them, for web_caption."""
    question_column: str = "question"
    """Questions, or a list of them, for qa."""
    answer_column: str = "answer"
    """Answers, or a list of them, one for each question, for qa. Boxes in them are `<locYYYY>` four times."""
    boxes_column: str = "boxes"
    """Boxes as four numbers, or a list of such, for qa."""
    labels_column: str = "labels"
    """What the boxes show: a text for each."""
    box_order: BoxOrder = "xyxy"
    """What the four numbers are."""
    box_range: float | None = None
    """The number that stands for the image's far edge: 1 or 1000, say; by default boxes are in pixels."""
    camera_column: str = "camera"
    """Each image's camera name."""
    camera: str = "image"
    """Camera name of all images, where there is no such column."""
    caption_prompt: str = "caption"
    """What the model is asked when it is to say the caption."""
    box_prompt: str = "detect {labels}"
    """What it is asked when it is to say the boxes; each label is named once."""
    parts: dict[Split, str] | None = None
    """Which of the dataset's parts is train, val and test, where names do not tell; several as "first+second"."""
    val_fraction: float = 0.1
    """Share of the training rows held out where the dataset has no validation part; 0 holds out none."""
    group_column: str | None = None
    """Column whose equal values stay on one side of that split, such as the number of the scene."""
    convert_images: bool = False
    """Take grey, transparent and 16-bit images too: grey in every channel, over white, scaled to 8 bits."""
    on_bad_sample: OnBadSample = "error"
    """Whether a row that cannot be trained on stops the run or is left out, counted and logged."""

    def __post_init__(self) -> None:
        for key in ("caption_prompt", "box_prompt", "camera"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key} is {getattr(self, key)!r}: write what is meant, or leave it out")
        if unknown := fields_of(self.box_prompt) - {"labels"}:
            raise ValueError(f"box_prompt asks for {', '.join(sorted(unknown))}: only {{labels}} is filled in")
        check_fraction(self.val_fraction)
        check_range("stream_rows", self.stream_rows, 1)
        check_range("box_range", self.box_range, 0, above=True)

    def open(self, name: str, split: Split, shapes: Shapes) -> VisionTextSource:
        """Raises ValueError for a wrong configuration and BadSample for bad data, unless that is to be skipped."""
        return VisionTextSource(self, name, split)

    @property
    def texts(self) -> dict[str, tuple[str, ...]]:
        """The kinds of text that a row may have, by their first column, each with all the columns it needs."""
        return {
            self.caption_column: (self.caption_column,),
            self.question_column: (self.question_column, self.answer_column),
            self.boxes_column: (self.boxes_column, self.labels_column),
        }


class VisionTextSource(Source):
    """One frame per image and kind of text: first all with a caption, then all with questions, then all with boxes."""

    def __init__(self, config: VisionTextConfig, name: str, split: Split):
        self.config, self.name = config, name
        self.rejects: Rejects = Rejects(name, config.on_bad_sample)
        self.on_bad_sample = config.on_bad_sample
        self._folders, parts = _load(config, tell=split == "train")
        self.hub_id = None if Path(config.path).expanduser().exists() else config.path
        self._data, rows = self._part(parts, split)
        self._has_camera = config.camera_column in self._data.column_names
        named = self._data.unique(config.camera_column) if self._has_camera else [config.camera]
        if not all(isinstance(camera, str) and camera.strip() for camera in named):
            raise ValueError(f"dataset {name!r}: {config.camera_column} does not name a camera in every row: {named}")
        self._cameras = sorted(named)
        self._rows, self._kind = self._with_text(rows)

    @property
    def camera_names(self) -> list[str]:
        return self._cameras

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Frame:
        config, row = self.config, self._data[int(self._rows[index])]
        camera = row[config.camera_column] if self._has_camera else config.camera
        try:
            image = read_stored(row[config.image_column], self._folders, config.convert_images)
        except BadImage as error:
            where = f"{self._row_address(index)}, {config.image_column}"
            raise BadSample(f"{where}: {error}. Restore the image or drop the row") from error
        try:
            pairs = self._pairs(list(config.texts)[self._kind[index]], row, image)
        except ValueError as error:
            raise BadSample(
                f"{self.address(index)}: {error}. Correct it, box_order, which is {config.box_order}, or box_range"
            ) from error
        answers = tuple(Answer(question.strip(), answer.strip(), camera) for question, answer in pairs)
        return Frame(images={camera: image}, answers=answers)

    def indices(self, modality: Modality) -> np.ndarray:
        """i64: frames with a caption (web_caption), with questions or boxes (qa)."""
        match modality:
            case Modality.WEB_CAPTION:
                return np.flatnonzero(self._kind == 0)
            case Modality.QA:
                return np.flatnonzero(self._kind > 0)
            case _:
                return np.empty(0, dtype=np.int64)

    def sizes(self, modality: Modality) -> Sizes:
        """By the characters of the row's text of this kind."""
        length = np.zeros(len(self), dtype=np.int64)
        for kind, names in enumerate(self.config.texts.values()):
            frames = np.flatnonzero(self._kind == kind)
            for name in names if len(frames) else ():
                column = self._data[name][:]
                length[frames] += [sum(len(str(text)) for text in _texts(column[row])) for row in self._rows[frames]]
        return Sizes(images=1, answers=length[self.indices(modality)])

    def address(self, index: int) -> str:
        """The frame in words: "dataset 'x', row 17, caption"."""
        return f"{self._row_address(index)}, {list(self.config.texts)[self._kind[index]]}"

    def _row_address(self, index: int) -> str:
        among = "" if self.config.stream_rows is None else " of those read from the stream"
        return f"dataset {self.name!r}, row {self._rows[index]}{among}"

    def _pairs(self, kind: str, row: dict[str, Any], image: np.ndarray) -> list[tuple[str, str]]:
        """Questions and answers of a row; ValueError for boxes outside the image."""
        config = self.config
        if kind == config.caption_column:
            return [(config.caption_prompt, caption) for caption in _texts(row[kind])]
        if kind == config.question_column:
            return list(zip(_texts(row[kind]), _texts(row[config.answer_column]), strict=True))
        height, width = (config.box_range,) * 2 if config.box_range else image.shape[1:]
        boxes, labels = _boxes(row[kind]), _texts(row[config.labels_column])
        answer = detections([to_box(box, config.box_order, height, width) for box in boxes], labels)
        return [(config.box_prompt.format(labels=" ; ".join(dict.fromkeys(labels))), answer)]

    def _part(self, parts: dict[str, datasets.Dataset], split: Split) -> tuple[datasets.Dataset, np.ndarray]:
        """The dataset to read for the split, and its rows i64 that belong to it."""
        named = self._named(list(parts))
        own = split if split in named else "train"
        data = self._select(datasets.concatenate_datasets([parts[name] for name in named[own]]))
        if own == split and (split != "train" or "val" in named):
            return data, np.arange(len(data))
        if split == "test":
            return data, np.empty(0, dtype=np.int64)
        in_val = self._held_out(data)
        if split == "val" and self.config.val_fraction and not in_val.any():
            log.warning("dataset %r: no row is held out, so there is no validation on it", self.name)
        return data, np.flatnonzero(in_val if split == "val" else ~in_val)

    def _named(self, names: list[str]) -> dict[Split, list[str]]:
        """The names of each part, training's at least; ValueError where neither names nor `parts` tell."""
        where = f"dataset {self.name!r}"
        given = {split: name.split("+") for split, name in (self.config.parts or {}).items()}
        taken = [name for several in given.values() for name in several]
        unknown = sorted(set(taken) - set(names))
        if unknown:
            raise ValueError(f"{where} has no parts {unknown}: it has {names}; correct `parts`")
        if len(set(taken)) < len(taken):
            raise ValueError(f"{where}: `parts` names a part twice in {self.config.parts}: each is for one split")
        left = [name for name in names if name not in taken]
        found = {split: [name] for split, name in named_parts(left, f"{where}, `parts`").items() if split not in given}
        found |= given
        unused = [name for name in left if [name] not in found.values()]
        if "train" not in found and len(unused) == len(names) == 1:
            return {"train": names}  # it is not divided
        if "train" not in found:
            raise ValueError(
                f"{where} has the parts {names}, none of them for training: name it, as `parts: {{train: …}}`"
            )
        if unused and self.config.parts is None:
            log.warning(
                "%s: its parts %s are not used: to train on them too, set parts: {train: %s}",
                where,
                unused,
                "+".join([*found["train"], *unused]),
            )
        return found

    def _held_out(self, data: datasets.Dataset) -> np.ndarray:
        """bool: rows that validation takes from the training part, spread evenly over equal questions and labels.

        No kind of text leaves training by it.
        """
        config, rows = self.config, range(len(data))
        names = {*config.texts, config.labels_column} & set(data.column_names)
        columns = {name: data[name][:] for name in sorted(names)}
        kinds = [{name for name in names & set(config.texts) if columns[name][row] not in (None, [])} for row in rows]
        if config.group_column is None:
            spread = [columns[name] for name in (config.question_column, config.labels_column) if name in names]
            alike = [(*sorted(kinds[row]), *(str(column[row]) for column in spread)) for row in rows]
            return held_out(alike, kinds, config.val_fraction)
        numbers: dict[str, int] = {}
        group = [numbers.setdefault(str(value), len(numbers)) for value in data[config.group_column][:]]
        taught: list[set[str]] = [set() for _ in numbers]
        for number, kind in zip(group, kinds, strict=True):
            taught[number] |= kind
        return held_out([()] * len(numbers), taught, config.val_fraction)[group]

    def _select(self, data: datasets.Dataset) -> datasets.Dataset:
        config, present = self.config, data.column_names
        kinds = [columns for columns in config.texts.values() if set(columns) <= set(present)]
        needed = [config.image_column, *([config.group_column] if config.group_column else [])]
        absent = sorted(set(needed) - set(present))
        if absent or not kinds:
            raise ValueError(
                f"dataset {self.name!r} has no {absent or 'captions, questions with answers, nor boxes with labels'};"
                f" its columns are {present}: say which of them hold what"
            )
        wanted = {*needed, *({config.camera_column} & set(present))}.union(*kinds)
        data, key = data.select_columns(sorted(wanted)), config.image_column
        try:
            if data.features[key] == datasets.Value("string_view"):  # which `datasets` casts to no image
                data = data.cast_column(key, datasets.Value("string"))
            return data.cast_column(key, datasets.Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(
                f"dataset {self.name!r}, {key} holds {data.features[key]}, and neither images nor their paths"
            ) from error

    def _with_text(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row i64 and kind of text i64 of every frame, by kind; rows without text, or a wrong one, are rejected."""
        config = self.config
        present = self._data.column_names
        columns = {
            name: self._data[name][:] if name in present else None for names in config.texts.values() for name in names
        }
        found: list[tuple[int, int]] = []
        problems: dict[int, tuple[str, str]] = {}
        for row in rows.tolist():
            here = {name: column[row] if column else None for name, column in columns.items()}
            kinds = [i for i, name in enumerate(config.texts) if here[name] not in (None, [])]
            wrong = [(name, what) for name in config.texts if (what := self._problem(name, here))]
            if wrong or not kinds:
                problems[row] = wrong[0] if wrong else (", ".join(config.texts), "it has no text at all")
            else:
                found += [(kind, row) for kind in kinds]
        if problems:
            first, (key, problem) = next(iter(problems.items()))
            self.rejects.add(f"row {first}, {key}", problem, "Drop the row or correct it", len(problems))
        kind_of_frame, row_of_frame = np.array(sorted(found), dtype=np.int64).reshape(-1, 2).T
        return row_of_frame, kind_of_frame

    def _problem(self, kind: str, row: dict[str, Any]) -> str | None:
        """What is wrong with one kind of text of a row, or None."""
        config = self.config
        if kind == config.boxes_column:
            boxes, labels = _boxes(row[kind]), _texts(row[config.labels_column])
            if row[kind] is not None and len(boxes) != len(labels):
                return f"{len(boxes)} boxes but {len(labels)} labels"
            if not all(isinstance(label, str) for label in labels):
                return "labels must be texts"
            return None if all(label.strip() for label in labels) else "a label is empty"
        texts = [_texts(row[name]) for name in config.texts[kind]]
        if len(texts[0]) != len(texts[-1]):
            return f"{len(texts[0])} questions but {len(texts[-1])} answers"
        for text in (text for several in texts for text in several):
            if not isinstance(text, str):
                return f"{text!r} is no text"
            if not text.strip():
                return "a text is empty"
        return next(filter(None, map(misplaced, [*texts[0], *texts[-1]])), None)


def _load(config: VisionTextConfig, tell: bool) -> tuple[list[Path], dict[str, datasets.Dataset]]:
    """Where image paths start, and the dataset's parts by name; one that is not divided is all "train".

    tell: warn of files that are not read, or that may be kept from training by mistake.
    Raises ValueError naming the path when it cannot be read.
    """
    local = Path(config.path).expanduser().absolute()
    folders, files = [local], dict[str, list[Path]]()
    streaming = config.stream_rows is not None
    found: Any
    is_saved = any((local / name).exists() for name in _SAVED_BY_DATASETS)
    if local.exists() and not is_saved:
        files, builder = files_by_part(local, shown(config.path), tell, config.parts is not None)
    elif not local.exists() and not is_hub_id(config.path):
        raise ValueError(f"{shown(config.path)}: no such file or folder. Name one, or a Hub id as owner/name.")
    try:
        if is_saved:
            found = datasets.load_from_disk(_plain(local))
        elif files:
            folders = list(dict.fromkeys([*folders, *(file.parent for part in files.values() for file in part)]))
            names = {part: [escape(str(_plain(file))) for file in group] for part, group in files.items()}
            found = datasets.load_dataset(builder, data_files=names, streaming=streaming)
        else:
            repo, revision = split_revision(config.path)
            found = datasets.load_dataset(repo, config.subset, revision=revision, streaming=streaming)
        parts = dict(found) if isinstance(found, dict) else {"train": found}
        if config.stream_rows is not None:
            version = [(str(file), file.stat().st_mtime_ns) for group in files.values() for file in group]
            parts = {name: _some_rows(part, [name, version], config) for name, part in parts.items()}
    except (pa.ArrowException, OSError, ValueError, NotImplementedError, _DatasetError) as error:
        reason, named = error.__cause__ or error, config.path if local.exists() else shown(config.path)
        raise ValueError(f"{named} cannot be read ({reason}): correct it, or restore it from its origin") from error
    return folders, parts


def _plain(path: Path) -> Path:
    """The file or folder under a name that fsspec, through which `datasets` reads, does not take for a chain of URLs.

    That is a link in the cache of `datasets`, the same for the same path, as what is cached goes by it.
    """
    if "::" not in str(path) and "://" not in str(path):
        return path
    digest = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    link = Path(datasets.config.HF_DATASETS_CACHE) / "pi05_links" / digest / path.name.replace(":", "_")
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        link.symlink_to(path)
    return link


def _some_rows(stream: datasets.IterableDataset | datasets.Dataset, version: list, config: VisionTextConfig) -> Any:
    """So many rows of a shuffled part, kept in the cache of `datasets`: draws are by index, and a stream has none.

    Shuffled are the files, and the rows within a buffer, in the same way every time: of two counts the smaller one's
    rows are among the larger one's.
    """
    count = cast("int", config.stream_rows)
    if isinstance(stream, datasets.Dataset):  # saved by `datasets`: it is memory-mapped, and nothing has to be fetched
        return stream.select(np.random.default_rng(0).permutation(len(stream))[:count], keep_in_memory=True)
    if config.image_column in (stream.column_names or ()):
        stream = stream.cast_column(config.image_column, datasets.Image(decode=False))
    rows = stream.shuffle(seed=0, buffer_size=_SHUFFLE_BUFFER).take(count)
    digest = hashlib.blake2b(
        repr(("shuffled", config.path, config.subset, count, version)).encode(), digest_size=8
    ).hexdigest()
    return datasets.Dataset.from_generator(_rows, rows.features, gen_kwargs={"rows": rows}, fingerprint=digest)


def _rows(rows: datasets.IterableDataset) -> Any:
    yield from rows


def _texts(value: Any) -> list[Any]:
    """The texts of a cell, whatever is in it instead: one is as a list of one."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _boxes(value: Sequence[Any] | None) -> list[Sequence[float]]:
    """One box or several, as several."""
    if not value:
        return []
    return list(value) if isinstance(value[0], (list, tuple)) else [cast("Sequence[float]", value)]
