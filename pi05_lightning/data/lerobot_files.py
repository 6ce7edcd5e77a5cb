"""The files of a LeRobot v3 dataset, read with pyarrow: metadata, episodes, tasks, and which episodes a split has.

meta/info.json                      fps, features, path templates, splits
meta/tasks.parquet                  sentence -> task_index
meta/subtasks.parquet               sentence -> subtask_index (older datasets)
meta/episodes/*/*.parquet           per episode: length, data file, and per video its file and start in it
data/*/*.parquet, videos/*/*/*.mp4  frames, many episodes to a file
"""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.columns import is_text, real_numbers, whole_numbers
from pi05_lightning.data.open_files import check_open_files, reading_parquet
from pi05_lightning.data.outcomes import SUCCESS, with_known_outcomes, with_outcomes
from pi05_lightning.data.split import Split, held_out, named_parts
from pi05_lightning.files.hub import is_hub_id, split_revision
from pi05_lightning.files.local import first_line, read_json, shown

MISSING_SHOWN = 5  # tasks and subtasks that a warning names

Sentence = tuple[Literal["task", "subtask"], str]

log = logging.getLogger(__name__)


def find_dataset(path: str, local_only: bool = False) -> Path:
    """The folder of a dataset: `path` itself, LeRobot's copy of that Hub id, or a download of it.

    A Hub id may name a branch, a tag or a commit, as `owner/name@revision`; else it is what LeRobot would take.
    What was downloaded is found again where the Hub cannot be reached, as from a cluster's nodes.
    local_only: the Hub is not asked.
    Raises ValueError when there is neither a folder nor such a dataset on the Hub, or, `local_only`, a copy of it here.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if not is_hub_id(path):
        raise ValueError(
            f"{shown(path)}: no such folder. Name a LeRobot dataset's folder, or its Hub id as owner/name."
        )
    return _of_hub(path, local_only)


@cache  # the Hub is asked once, not for every part and its workers
def _of_hub(name: str, local_only: bool) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
    from lerobot.datasets.utils import CompatibilityError, get_safe_version, has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE

    repo, revision = split_revision(name)
    own = HF_LEROBOT_HOME / repo
    is_here = revision is None and (own / "meta" / "info.json").exists()
    if is_here and not has_legacy_hub_download_metadata(own):  # of an older LeRobot, which may be of an older version
        return own
    download = partial(snapshot_download, repo, repo_type="dataset", cache_dir=HF_LEROBOT_HUB_CACHE)

    def downloaded_before() -> Path | None:
        with suppress(OSError):
            return Path(download(revision=revision or CODEBASE_VERSION, local_files_only=True))
        return own if is_here else None

    if local_only:
        if (kept := downloaded_before()) is None:
            raise ValueError(f"{shown(name)} is no folder, and LeRobot has no dataset of that name on this machine")
        return kept
    try:
        return Path(download(revision=revision or get_safe_version(repo, CODEBASE_VERSION)))
    except (CompatibilityError, RuntimeError) as error:  # LeRobot's, of its versions on the Hub
        if is_here:
            return own
        raise ValueError(
            f"{repo} on the Hub has no version that LeRobot opens ({first_line(error)}): download it (`hf download"
            f" --repo-type dataset {repo} --local-dir FOLDER`) and name the folder, of which its format is told"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        if (kept := downloaded_before()) is not None:
            return kept
        raise ValueError(
            f"{shown(name)} is no folder, and the Hub does not give it ({error}): correct the path, check the "
            "connection, or log in if it is private"
        ) from error


@dataclass(frozen=True)
class DataFiles:
    """The files under data/ that can be read, each with the episodes in it, i64 ascending; and why others cannot be."""

    episodes: dict[Path, np.ndarray]
    damaged: dict[Path, str]


@dataclass(frozen=True)
class LeRobotFiles:
    """One dataset's folder and what its metadata says."""

    root: Path
    info: dict[str, Any]
    episodes: pa.Table
    """One row per episode, by episode_index, without the per-episode statistics; with what `pi05 outcomes` was told."""

    @classmethod
    def open(cls, root: Path) -> LeRobotFiles:
        """Raises ValueError when the folder is no LeRobot v3 dataset, or its metadata is damaged."""
        root = root.absolute()  # arrow and ffmpeg take what is before a relative path's colon for a protocol
        if not (root / "meta" / "info.json").exists():
            raise ValueError(f"{root} is not a LeRobot dataset: it has no meta/info.json")
        info = read_json(root / "meta" / "info.json")
        version = str(info.get("codebase_version"))
        if not version.startswith("v3."):
            raise ValueError(
                f"{root} has LeRobot's format {version}, and v3 is needed: convert it{_conversion(root, version)}"
            )
        _check_rate(root, info.get("fps"))
        _check_features(root, info)
        parts = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
        if not parts:
            raise ValueError(f"{root} has no meta/episodes: it was not finalised, record it again or restore it")
        try:
            episodes = pa.concat_tables([read_episodes(part) for part in parts], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{root}/meta/episodes: its files have columns of different types ({error})") from error
        files = cls(root, info, episodes.sort_by("episode_index"))
        numbers = files.column("episode_index")
        if (np.diff(numbers) == 0).any():
            twice = numbers[:-1][np.diff(numbers) == 0].tolist()
            raise ValueError(f"{root}/meta/episodes lists the episodes {twice} more than once: leave one row for each")
        return replace(files, episodes=with_outcomes(files.episodes, root))

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    def sentences(self, table: str, column: str) -> dict[int, str]:
        """`meta/{table}.parquet` as {column_index: sentence}; empty when there is no such file.

        The sentences are the table's pandas index, whatever its name, as LeRobot reads it (`load_tasks` in its
        `datasets/io_utils.py`); without one of texts, as where rows were filtered, they are in `column`.  Raises
        ValueError when they are in neither, and for a number with two sentences.
        """
        path = self.root / "meta" / f"{table}.parquet"
        if not path.exists():
            return {}
        with reading_parquet(path, remedy="restore it from its origin"):
            rows = pq.read_table(path)
        index = [name for name in (rows.schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        names = [
            name
            for name in (*sorted(index, key=column.__ne__), column)  # of several levels the one of that name
            if name in rows.column_names and is_text(rows.schema.field(name).type)
        ]
        if not names or f"{column}_index" not in rows.column_names:
            raise ValueError(
                f"{path} needs the columns {column}_index and {column} (or pandas' index in its place), of texts, and"
                f" has {_described(rows.schema)}: write it with LeRobot, or rename them"
            )
        numbers = whole_numbers(rows[f"{column}_index"], f"{path}, {column}_index").tolist()
        found: dict[int, str] = {}
        for number, sentence in zip(numbers, rows[names[0]].cast(pa.string()).to_pylist(), strict=True):
            if found.setdefault(number, sentence) != sentence:
                raise ValueError(
                    f"{path} has two sentences for {column}_index {number}, {found[number]!r} and {sentence!r}: leave"
                    " the right one"
                )
        return found

    @property
    def names_subtasks(self) -> bool:
        """Whether meta/subtasks.parquet is there. LeRobot's tools that edit datasets leave it out."""
        return (self.root / "meta" / "subtasks.parquet").exists()

    def cameras(self) -> list[str]:
        """Keys of the colour image features, in the dataset's order."""
        return [
            key
            for key, feature in self.features.items()
            if feature["dtype"] in ("video", "image") and not _is_depth(feature)
        ]

    def column(self, name: str) -> np.ndarray:
        """A column of whole numbers of the episode table, i64 per episode."""
        return whole_numbers(self.episodes.column(name), f"{self.root}/meta/episodes, {name}")

    def video_column(self, key: str, name: str) -> np.ndarray:
        """What the episode table says of a camera's videos, f64 per episode; NaN where it says nothing."""
        column = f"videos/{key}/{name}"
        if column not in self.episodes.column_names:
            return np.full(len(self.episodes), np.nan)
        return real_numbers(self.episodes.column(column), f"{self.root}/meta/episodes, {column}")

    @cached_property
    def data(self) -> DataFiles:
        """The data files, found as LeRobot finds them (`load_nested_dataset` in its `datasets/io_utils.py`).

        By what is in them: the file numbers in meta/episodes are wrong after some merges and conversions, where nobody
        noticed, since LeRobot does not follow them.
        """
        found: dict[Path, np.ndarray] = {}
        damaged: dict[Path, str] = {}
        for path in sorted((self.root / "data").glob("*/*.parquet")):
            try:
                column = pq.read_table(path, columns=["episode_index"]).column("episode_index")
                found[path] = np.unique(whole_numbers(column, f"{path}, episode_index"))
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                check_open_files(error, path)
                damaged[path] = f"{path} is damaged ({error})"
        return DataFiles(found, damaged)

    def absent(self, episode: int) -> str:
        """Why no data file has the rows of an episode."""
        if self.data.damaged:
            return next(iter(self.data.damaged.values()))
        nowhere = f"no file in {self.root}/data has its rows"
        if "data_path" not in self.info or "data/file_index" not in self.episodes.column_names:
            return nowhere
        row = int(np.searchsorted(self.column("episode_index"), episode))
        named = {f"{part}_index": int(self.column(f"data/{part}_index")[row]) for part in ("chunk", "file")}
        path = self.root / self.info["data_path"].format(**named)
        return nowhere if path.exists() else f"{path} is missing"

    def video_path(self, key: str, chunk: int, file: int) -> Path:
        return self.root / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)

    def choose(
        self,
        split: Split,
        val_fraction: float,
        only: list[int] | str | None,
        taught: Mapping[int, Collection[Sentence]] | None = None,
    ) -> np.ndarray:
        """The episodes of a split that pass a filter, i64 ascending.

        The splits follow info.json: only what it declares for training is trained on, or, where it declares nothing for
        training, what it declares for nothing else.  Where it declares no validation split, that is `held_out` of the
        training episodes, before the filter: no task and no subtask leaves training by it, nor by the filter.  There is
        a test split only where it declares one.  `NAMES` in `data/split.py` has the names of the three.
        only: episode numbers, or an SQL condition on the episode table, such as "length >= 50 AND success".
        taught: what each episode has frames of; by default the tasks in the episode table.
        Validation may be left without any, with a warning.  Raises ValueError when training is, a number does not
        exist, the condition is no SQL or `splits` cannot be.
        """
        episodes = self.column("episode_index").astype(np.int64)
        if taught is None and "tasks" in self.episodes.column_names:
            tasks = self.episodes.column("tasks").to_pylist()
            taught = {int(n): {("task", text) for text in of or ()} for n, of in zip(episodes, tasks, strict=True)}
        contents = [set((taught or {}).get(int(number), ())) for number in episodes]
        parts, declared = self._splits(episodes, split)
        in_train, none = parts.get("train", ~declared), np.zeros(len(episodes), bool)
        if not in_train.any() and split == "train":
            raise ValueError(
                f"{self.root}: none of its {len(episodes)} episodes is left to train on; correct `splits` in"
                " meta/info.json"
            )
        passed = self._passed(episodes, only)
        if "val" in parts:
            in_val = parts["val"] & passed
        else:
            in_val = none.copy()
            rows = np.flatnonzero(in_train)
            groups = [frozenset(text for kind, text in contents[row] if kind == "task") for row in rows]
            in_val[rows] = held_out(groups, [contents[row] for row in rows], val_fraction)
            in_val &= passed
            known = _union(contents, in_train & passed & ~in_val)
            for row in np.flatnonzero(in_val):
                if not contents[row] <= known:  # the filter left out those that it was held out beside
                    in_val[row] = False
                    known |= contents[row]
        chosen: dict[Split, np.ndarray] = {
            "train": in_train & passed & ~in_val,
            "val": in_val,
            "test": parts.get("test", none) & passed,
        }
        if not chosen["train"].any() and split == "train":
            raise ValueError(f"{self.root}: `episodes`: {only!r} leaves none in the train split; widen it")
        if not in_val.any() and split == "val" and val_fraction:
            log.warning(
                "%s: no episode is held out, so there is no validation on it. Declare `splits` in meta/info.json where"
                " each has a task or subtask that no other has",
                self.root,
            )
        self._tell_missing(split, _union(contents, chosen["train"]), _union(contents, in_val))
        return episodes[chosen[split]]

    def _passed(self, episodes: np.ndarray, only: list[int] | str | None) -> np.ndarray:
        """bool like `episodes`: those that pass the filter; ValueError for numbers that there are not, and bad SQL."""
        if isinstance(only, str):
            return np.isin(episodes, self._matching(only))
        if only is None:
            return np.ones(len(episodes), dtype=bool)
        unknown = np.setdiff1d(only, episodes).tolist()
        if unknown:
            raise ValueError(f"{self.root} has no episodes {unknown}: it has {len(episodes)}; correct `episodes`")
        return np.isin(episodes, only)

    def _tell_missing(self, split: Split, train: set[Sentence], val: set[Sentence]) -> None:
        """Warn of what validation lacks, and of what is declared for validation alone."""
        if split == "val" and val:
            missing, what = train - val, "validation has no episode with"
        elif split == "train":
            missing, what = val - train, "only the episodes declared for validation have"
        else:
            return
        if missing:
            first = ", ".join(f"{kind} {text!r}" for kind, text in sorted(missing)[:MISSING_SHOWN])
            more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
            log.warning("%s: %s %s%s", self.root, what, first, more)

    def _splits(self, episodes: np.ndarray, split: Split) -> tuple[dict[Split, np.ndarray], np.ndarray]:
        """Which episodes info.json declares for each part, bool like `episodes`, and which it declares for anything.

        split: the one that is chosen; with training what is not used is told.  ValueError for what is not "first:end",
        for splits that share an episode, for two that are the same part, and where no name is one of a part's.
        """
        where = f"{self.root}/meta/info.json"
        declared = self.info.get("splits") or {}
        if not isinstance(declared, dict):
            raise ValueError(f'{where}: splits is {declared!r}, not split by split as in {{"train": "0:80"}}')
        found: dict[str, np.ndarray] = {}
        for name, bounds in declared.items():
            match = re.fullmatch(r"(\d+):(\d+)", bounds) if isinstance(bounds, str) else None
            if not match or int(match[1]) >= int(match[2]):
                raise ValueError(f"{where}: split {name} is {bounds!r}, not first:end, as in 80:100")
            first, end = map(int, match.groups())
            found[name] = (episodes >= first) & (episodes < end)
            if not found[name].any():
                raise ValueError(
                    f"{where}: split {name} is {bounds}, and the dataset has {len(episodes)} episodes, numbered"
                    f" {episodes.min()} to {episodes.max()}: correct `splits`, or remove it to train on all of them"
                )
        for one, other in combinations(found, 2):
            if (found[one] & found[other]).any():
                raise ValueError(
                    f"{where}: the splits {one} ({declared[one]}) and {other} ({declared[other]})"
                    " share episodes: correct one of them"
                )
        named = named_parts(found, where)
        others = ", ".join(f"{name} ({declared[name]})" for name in found if name not in named.values())
        if others and not named:
            raise ValueError(f"{where}: splits has {others}, and nothing that is called train: name it so")
        if others and split == "train":
            log.warning("%s: the episodes of the splits %s are not used: their names say no part", where, others)
        declared_somewhere = np.any([*found.values(), np.zeros(len(episodes), bool)], axis=0)
        if split == "train" and "train" in named and not declared_somewhere.all():
            left = episodes[~declared_somewhere]
            log.warning(
                "%s: %d of %d episodes, as number %d, are in none of its splits (%s), and are not used: correct"
                " `splits`, or remove it",
                *(where, len(left), len(episodes), left[0], declared),
            )
        parts = {part: found[name] for part, name in named.items()}
        return parts, declared_somewhere

    def _matching(self, condition: str) -> np.ndarray:
        episodes = self.episodes
        if SUCCESS in condition.lower():  # only then its frames are read, which may tell it too
            episodes = with_known_outcomes(episodes, self.data.episodes, self.root)
        with duckdb.connect() as connection:
            connection.execute("SET enable_external_access = false")
            connection.register("episodes", episodes)
            try:
                found = connection.execute(f"SELECT episode_index FROM episodes WHERE {condition}").fetchnumpy()
            except duckdb.Error as error:
                columns = ", ".join(episodes.column_names)
                raise ValueError(
                    f"episodes: {condition!r} is no SQL condition ({first_line(error)}). Columns: {columns}"
                ) from error
        return np.asarray(found["episode_index"])


def _union(contents: Sequence[set[Sentence]], rows: np.ndarray) -> set[Sentence]:
    """What the chosen rows, bool, hold together."""
    return set().union(*(contents[row] for row in np.flatnonzero(rows)))


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _check_rate(root: Path, fps: Any) -> None:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"{root}/meta/info.json: fps is {fps!r}: write the number of frames a second")


def _check_features(root: Path, info: dict[str, Any]) -> None:
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        raise ValueError(f"{root}/meta/info.json lacks features: restore it from its origin")
    for key, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
            raise ValueError(f"{root}/meta/info.json: the feature {key} lacks its dtype or shape: write them")
        if feature["dtype"] == "video" and not isinstance(info.get("video_path"), str):
            raise ValueError(f"{root}/meta/info.json: {key} is a video, and video_path does not say where: write it")


def _conversion(root: Path, version: str) -> str:
    """How to convert a dataset of an older format, by what LeRobot's converter needs and asks for."""
    if version != "v2.1":
        return " to v2.1 and then to v3 with the converters of LeRobot's older releases"
    name, folder = shlex.quote(f"{root.parent.name}/{root.name}"), shlex.quote(str(root))
    return (
        f" with\npython -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={name} --root={folder}"
        f" --push-to-hub=false\nwhich keeps the old one as {root.name}_old"
    )


def dim_names(feature: dict[str, Any]) -> list[str] | None:
    """The names of a vector's dims: LeRobot writes a list, lists by what they name or in a list, or each name's number.

    None where they are not as many as the dims.
    """
    found = _flat(feature.get("names") or ())
    return found if len(found) == feature["shape"][0] else None


def _flat(names: Any) -> list[str]:
    if isinstance(names, dict):
        numbers = list(names.values())
        names = sorted(names, key=names.__getitem__) if all(type(number) is int for number in numbers) else numbers
    if isinstance(names, list | tuple):
        return [name for part in names for name in _flat(part)]
    return [str(names)]


def read_episodes(path: Path) -> pa.Table:
    """The episodes of a file of meta/episodes, without their statistics. ValueError where it is damaged."""
    with reading_parquet(path, remedy="restore it from its origin"):
        names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
        return pq.read_table(path, columns=names)


def _is_depth(feature: dict[str, Any]) -> bool:
    info = (feature.get("video_info") or {}) | (feature.get("info") or {})
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))
