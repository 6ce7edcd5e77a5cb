"""Which episodes of a LeRobot dataset a split has, by what info.json declares and what a user asks for."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import duckdb
import numpy as np

from pi05_lightning.data.lerobot_files import LeRobotFiles, Sentence
from pi05_lightning.data.outcomes import SUCCESS, with_known_outcomes
from pi05_lightning.data.split import Split, held_out, named_parts
from pi05_lightning.files.local import first_line

MISSING_SHOWN = 5  # tasks and subtasks that a warning names

log = logging.getLogger(__name__)


def choose_episodes(
    files: LeRobotFiles,
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
    episodes = files.column("episode_index").astype(np.int64)
    if taught is None and "tasks" in files.episodes.column_names:
        tasks = files.episodes.column("tasks").to_pylist()
        taught = {int(n): {("task", text) for text in of or ()} for n, of in zip(episodes, tasks, strict=True)}
    contents = [set((taught or {}).get(int(number), ())) for number in episodes]
    parts, declared = _splits(files, episodes, split)
    in_train, none = parts.get("train", ~declared), np.zeros(len(episodes), bool)
    if not in_train.any() and split == "train":
        raise ValueError(
            f"{files.root}: none of its {len(episodes)} episodes is left to train on; correct `splits` in"
            " meta/info.json"
        )
    passed = _passed(files, episodes, only)
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
        raise ValueError(f"{files.root}: `episodes`: {only!r} leaves none in the train split; widen it")
    if not in_val.any() and split == "val" and val_fraction:
        log.warning(
            "%s: no episode is held out, so there is no validation on it. Declare `splits` in meta/info.json where"
            " each has a task or subtask that no other has",
            files.root,
        )
    _tell_missing(files, split, _union(contents, chosen["train"]), _union(contents, in_val))
    return episodes[chosen[split]]


def _passed(files: LeRobotFiles, episodes: np.ndarray, only: list[int] | str | None) -> np.ndarray:
    """bool like `episodes`: those that pass the filter; ValueError for numbers that there are not, and bad SQL."""
    if isinstance(only, str):
        return np.isin(episodes, _matching(files, only))
    if only is None:
        return np.ones(len(episodes), dtype=bool)
    unknown = np.setdiff1d(only, episodes).tolist()
    if unknown:
        raise ValueError(f"{files.root} has no episodes {unknown}: it has {len(episodes)}; correct `episodes`")
    return np.isin(episodes, only)


def _tell_missing(files: LeRobotFiles, split: Split, train: set[Sentence], val: set[Sentence]) -> None:
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
        log.warning("%s: %s %s%s", files.root, what, first, more)


def _splits(files: LeRobotFiles, episodes: np.ndarray, split: Split) -> tuple[dict[Split, np.ndarray], np.ndarray]:
    """Which episodes info.json declares for each part, bool like `episodes`, and which it declares for anything.

    split: the one that is chosen; with training what is not used is told.  ValueError for what is not "first:end",
    for splits that share an episode, for two that are the same part, and where no name is one of a part's.
    """
    where = f"{files.root}/meta/info.json"
    declared = files.info.get("splits") or {}
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


def _matching(files: LeRobotFiles, condition: str) -> np.ndarray:
    episodes = files.episodes
    if SUCCESS in condition.lower():  # only then its frames are read, which may tell it too
        episodes = with_known_outcomes(episodes, files.data.episodes, files.root)
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
