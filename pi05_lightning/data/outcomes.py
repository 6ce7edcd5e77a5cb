"""How episodes ended, as a person said afterwards: a file beside a dataset's metadata, of which nothing changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.columns import vectors, whole_numbers
from pi05_lightning.files.local import read_json

OUTCOMES = Path("meta", "pi05_outcomes.json")
"""In a dataset's folder: {episode: {"success": …, "frames": how many it had}}, written by `pi05 outcomes`."""
SUCCESS = "success"
"""The column of meta/episodes that says whether an episode succeeded."""
NEXT_SUCCESS = "next.success"
"""Column of frames that says whether the episode succeeded, true at the end."""


class Outcome(TypedDict):
    """What was said of an episode, and how many frames it had then, by which another one is told from it."""

    success: bool
    frames: int


def with_outcomes(episodes: pa.Table, root: Path) -> pa.Table:
    """The table of episodes with what a person said in its column `success`; of others, what was recorded, or null.

    Raises ValueError where the file is of other episodes, or says something else.
    """
    said = read_outcomes(root)
    if not said:
        return episodes
    frames = dict(zip(episodes["episode_index"].to_pylist(), episodes["length"].to_pylist(), strict=True))
    for number, about in said.items():
        if frames.get(number) != about["frames"]:
            raise ValueError(
                f"{root / OUTCOMES} is of other episodes: {number} had {about['frames']} frames, and now has"
                f" {frames.get(number, 'none')}. Remove that file, and say with `pi05 outcomes` how these ended"
            )
    told: dict[int, bool | None] = {number: about["success"] for number, about in said.items()}
    return _with_column(episodes, recorded_success(episodes, root) | told)


def with_known_outcomes(episodes: pa.Table, data: Iterable[Path], root: Path) -> pa.Table:
    """The table of episodes with all that is known in its column `success`; as it is where frames say nothing more."""
    known = known_outcomes(episodes, data, root)
    return episodes if known == recorded_success(episodes, root) else _with_column(episodes, known)


def known_outcomes(episodes: pa.Table, data: Iterable[Path], root: Path) -> dict[int, bool | None]:
    """Whether each episode succeeded, by its number, as the table or else its frames say; None for unknown.

    data: files of frames.
    """
    recorded = recorded_success(episodes, root)
    if None not in recorded.values():
        return recorded
    found: dict[int, bool | None] = dict.fromkeys(recorded)
    for path in data:
        if NEXT_SUCCESS in pq.read_schema(path).names:
            table = pq.read_table(path, columns=["episode_index", NEXT_SUCCESS])
            of_frame = whole_numbers(table.column("episode_index"), f"{path}, episode_index")
            reached = truths(table, NEXT_SUCCESS, path)
            for value, rows in ((False, ~np.isnan(reached)), (True, reached > 0)):
                found |= dict.fromkeys(np.unique(of_frame[rows]).tolist(), value)
    return found | {number: success for number, success in recorded.items() if success is not None}


def recorded_success(episodes: pa.Table, root: Path) -> dict[int, bool | None]:
    """Whether each episode succeeded, as the table says; None where it does not.

    Raises ValueError for a column `success` that is neither of truth values nor of numbers.
    """
    numbers = episodes["episode_index"].to_pylist()
    if SUCCESS not in episodes.column_names:
        return dict.fromkeys(numbers)
    try:
        values = episodes[SUCCESS].cast(pa.float64()).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{root}/meta/episodes, {SUCCESS}: {error}. It must be true or false") from error
    return {n: None if v is None or math.isnan(v) else v > 0 for n, v in zip(numbers, values, strict=True)}


def truths(table: pa.Table, name: str, path: object) -> np.ndarray:
    """What a column says of each frame, as truth values or numbers: f64; NaN for null."""
    column = table.column(name)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return vectors(column, 1, f"{path}, {name}")[0][:, 0].astype(np.float64)


def read_outcomes(root: Path) -> dict[int, Outcome]:
    """What was said of episodes, by their numbers. Raises ValueError for a file with something else in it."""
    path = root / OUTCOMES
    found: dict[int, Outcome] = {}
    try:
        for number, about in read_json(path, default={}).items():
            if not isinstance(about["success"], bool):
                raise TypeError(f"success is {about['success']!r}")
            found[int(number)] = Outcome(success=about["success"], frames=int(about["frames"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what `pi05 outcomes` writes ({error!r}): remove it, say it anew") from error
    return found


def _with_column(episodes: pa.Table, known: dict[int, bool | None]) -> pa.Table:
    others = [name for name in episodes.column_names if name != SUCCESS]
    values = [known.get(number) for number in episodes["episode_index"].to_pylist()]
    return episodes.select(others).append_column(SUCCESS, pa.array(values, pa.bool_()))
