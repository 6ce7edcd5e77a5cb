"""Which rows of a LeRobot dataset can be trained on: the others are an error, or are left out, by what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from pi05_lightning.data.errors import Rejects
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.places import misplaced
from pi05_lightning.data.robot import OUTLIER, OUTLIER_REMEDY, Robot, outlier
from pi05_lightning.data.sources.language import PERSISTENT, SUBTASK_INDEX, TextColumn
from pi05_lightning.data.sources.lerobot_chunks import Chunks, beyond
from pi05_lightning.data.sources.lerobot_columns import Columns
from pi05_lightning.data.statistics import FeatureStats
from pi05_lightning.types import Frame

log = logging.getLogger(__name__)


class Kept:
    """The rows of N that are trained on; what is left out of them is named with its address and counted."""

    def __init__(self, columns: Columns, rejects: Rejects) -> None:
        self.columns, self.rejects = columns, rejects
        self.mask = np.ones(len(columns.episode), dtype=bool)

    @property
    def rows(self) -> np.ndarray:
        """i64, in order."""
        return np.flatnonzero(self.mask)

    def reject(self, bad: np.ndarray, what: str, problem: str, remedy: str, row: int | None = None) -> None:
        """Leave out the rows for which bool[N] holds, if any is not left out yet.

        row: the one to name, by default the first of them.
        Raises BadSample unless they are to be skipped.
        """
        bad = bad & self.mask
        if bad.any():
            where = f"{self.columns.address(int(np.argmax(bad)) if row is None else row)}, {what}"
            self.rejects.add(where, problem, remedy, int(bad.sum()))
            self.mask &= ~bad


def reject_texts(kept: Kept, task: TextColumn, taught: np.ndarray) -> None:
    """Rows without a task, and where a place is none in the task, or in the subtask if that is taught, bool[N]."""
    kept.reject(task.codes < 0, "task_index", "it has no task sentence", "Add it to meta/tasks.parquet or give `task`")
    for what, texts, read in (("task", task, np.ones_like(taught)), ("subtask", kept.columns.subtask, taught)):
        for code, text in enumerate(texts.values):
            if problem := misplaced(text):
                kept.reject((texts.codes == code) & read, what, f"{text!r}: {problem}", "Correct the text")


def reject_not_finite(kept: Kept, chunks: Chunks, state_keys: list[str], action_keys: list[str]) -> None:
    """Rows whose state or action chunk holds NaN or infinity."""
    columns = kept.columns
    bad_state, bad_action = (~np.isfinite(values).all(axis=1) for values in (columns.state, columns.action))
    remedy = "Correct the data or leave the episode out with `episodes`"
    for keys, values, bad in (
        (state_keys, columns.state, bad_state),
        (action_keys, columns.action, chunks.holding(bad_action)),
    ):
        for row, dim in np.argwhere(~np.isfinite(values))[:1]:
            kept.reject(bad, " + ".join(keys), f"value {dim} is {values[row, dim]}", remedy, row)


def reject_outliers(kept: Kept, chunks: Chunks, robot: Robot, state_keys: list[str], action_keys: list[str]) -> None:
    """Rows whose state or action chunk a robot's statistics do not explain."""
    columns = kept.columns
    far_state, far_action = beyond(robot.normalize.state, columns.state), chunks.far(robot)
    for keys, bad in ((state_keys, far_state), (action_keys, far_action)):
        bad &= kept.mask
        if bad.any():
            row = int(np.argmax(bad))
            actions, is_pad = chunks.at(row) if action_keys else (None, None)
            frame = robot.to_model(Frame({}, state=columns.state[row], actions=actions, action_is_pad=is_pad))
            if bad is far_action and frame.actions is not None:  # the step that is wrong, not where its chunk begins
                row += int(np.argmax((np.abs(frame.actions) > OUTLIER).any(axis=1)))
            kept.reject(bad, " + ".join(keys), outlier(frame) or "", OUTLIER_REMEDY, row)


def reject_zero_range(
    kept: Kept,
    rows: np.ndarray,
    keys: list[str],
    values: np.ndarray,
    found: FeatureStats,
    relative: Sequence[int],
    rare_can_skip: bool,
) -> None:
    """Dims of f32[N D] that do not vary over some rows; no row is left out for it.

    relative: dims of which offsets were found, which are no single frame's: none is named for them.
    rare_can_skip: whether one that does vary, but rarely, may be skipped. Where they are trained on it is an error: all
    chunks with its rare values would be left out, and what they do would never be learned.
    """
    quantiles = found.quantiles
    dims = np.flatnonzero(quantiles.q01 == quantiles.q99)
    if len(dims):
        where, absolute = " + ".join(keys), np.setdiff1d(dims, relative)
        if len(absolute):
            odd = rows[(values[rows][:, absolute] != quantiles.q01[absolute]).any(axis=1)]
            where = f"{kept.columns.address(int(odd[0]) if len(odd) else int(rows[0]))}, {where}"
        remedy = "Set `min_range`, 0.01 say, to give them one, or take other features"
        low, high = found.min[dims].astype(np.float32), found.max[dims].astype(np.float32)
        rare = bool((high > low).any())
        if rare:
            remedy = (
                f"They reach {low.tolist()} to {high.tolist()}, which is rare: a `min_range` of"
                f" {(high - low).max():g} takes that for the range of all dims that have less. Or correct the"
                " data, or take other features"
            )
        kept.rejects.add(
            where,
            f"dimensions {dims.tolist()} have no range: both quantiles are {quantiles.q01[dims].tolist()}",
            remedy,
            0,
            can_skip=not rare or rare_can_skip,
        )


def say_how_it_is_read(columns: Columns, files: LeRobotFiles, subtask_key: str | None, where: str) -> None:
    """Warn of what the data leaves open, once."""
    gaps = (np.diff(columns.timestamp) > 1.5 / files.fps) & (np.diff(columns.episode) == 0)
    if gaps.any():
        log.warning(
            "%s: between %d of its frames and the next, the first in %s, some were left out. As in LeRobot, an"
            " action chunk goes on with the frames that there are, and there takes less time than it had",
            where,
            gaps.sum(),
            columns.address(int(np.argmax(gaps))),
        )
    indexed, timed = columns.subtasks_from[SUBTASK_INDEX], columns.subtasks_from[PERSISTENT]
    if indexed and PERSISTENT in files.features and subtask_key is None:
        log.warning(
            "%s: %s has subtasks of %d episodes; those of %d others are taken from %s. Name the one that counts as"
            " `subtask_key` to read no other",
            where,
            PERSISTENT,
            timed,
            indexed,
            SUBTASK_INDEX,
        )
    lacking = timed + indexed < len(np.unique(columns.episode))
    if lacking and SUBTASK_INDEX in files.features and subtask_key is None and not files.names_subtasks:
        log.warning(
            "%s: %s is not read: meta/subtasks.parquet, which names its subtasks, is missing. To train on them, restore"
            " it from the dataset that this one was made of; after a merge none fits, as each part had its own numbers",
            where,
            SUBTASK_INDEX,
        )
