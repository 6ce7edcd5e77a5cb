"""How a dataset's episodes went, frame by frame: where each ends, whether it succeeded, and who acted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pi05_lightning.data.columns import runs_of, whole_numbers
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.outcomes import known_outcomes, truths

COLLECTED = Path("meta", "pi05_collect.json")
"""Of the policy, in a dataset of its attempts: their subtasks are its own words, but for those of corrections."""
INTERVENTIONS = ("intervention", "is_intervention", "complementary_info.is_intervention")
"""Columns of frames in which somebody corrected the policy: LeRobot 0.6.1 records the first (rollout/context.py), and
its teleoperators call it the second."""


def of_a_policy(files: LeRobotFiles) -> bool:
    """Whether `pi05 collect --policy` recorded a dataset."""
    return (files.root / COLLECTED).is_file()


@dataclass(frozen=True)
class Attempts:
    """N frames of a whole dataset, in its order.

    episode, frame i64[N];  end i64[N]: the row where its episode ends;  success bool[N]: of its episode;
    intervention bool[N];  task: of each frame.
    """

    episode: np.ndarray
    frame: np.ndarray
    end: np.ndarray
    success: np.ndarray
    intervention: np.ndarray
    task: np.ndarray

    @cached_property
    def left(self) -> np.ndarray:
        """i64[N]: frames of its episode that come after it."""
        return self.end - 1 - np.arange(len(self.end))

    @cached_property
    def longest(self) -> dict[str, int]:
        """task -> frames of its longest episode; one that goes over to another task counts whole for both."""
        _, lengths = runs_of(self.episode)
        length = np.repeat(lengths, lengths)
        return {task: int(length[self.task == task].max()) for task in dict.fromkeys(self.task.tolist())}

    @classmethod
    def read(cls, files: LeRobotFiles, demonstrations: bool = False) -> Attempts:
        """Of all episodes.  demonstrations: all of them are successes, whatever they say.

        Raises ValueError where nothing says how an episode ended, and for a file that is damaged.
        """
        parts = [_read(path) for path in files.data.episodes]
        if files.data.damaged or not parts:
            raise ValueError(next(iter(files.data.damaged.values()), f"{files.root}/data holds no frames"))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((columns["frame"], columns["episode"]))
        columns = {name: column[order] for name, column in columns.items()}
        episode = columns["episode"]
        begins, lengths = runs_of(episode)
        known = dict.fromkeys(episode[begins].tolist(), True) if demonstrations else outcomes(files)
        ended = [known.get(number) for number in episode[begins].tolist()]
        if None in ended:
            raise ValueError(
                f"{files.root}: nothing says whether episode {episode[begins][ended.index(None)]} succeeded: say so"
                f" with `pi05 outcomes {files.root}`, or name the dataset among the demonstrations, which all succeeded"
            )
        sentences = files.sentences("tasks", "task")
        return cls(
            episode,
            columns["frame"],
            np.repeat(begins + lengths, lengths),
            np.repeat(np.array(ended, dtype=bool), lengths),
            columns["intervention"] > 0,
            np.array([sentences.get(int(number), "") for number in columns["task"]], dtype=object),
        )


def outcomes(files: LeRobotFiles) -> dict[int, bool | None]:
    """Whether each episode succeeded, by its number, as meta/episodes or else its frames say; None for unknown."""
    return known_outcomes(files.episodes, files.data.episodes, files.root)


def _read(path: Path) -> dict[str, np.ndarray]:
    """A data file's columns; intervention is 0 where no column says."""
    names = pq.read_schema(path).names
    corrected = next((name for name in INTERVENTIONS if name in names), None)
    wanted = ["episode_index", "frame_index", "task_index", *filter(None, (corrected,))]
    table = pq.read_table(path, columns=wanted)
    columns = {
        "episode": whole_numbers(table.column("episode_index"), f"{path}, episode_index"),
        "frame": whole_numbers(table.column("frame_index"), f"{path}, frame_index"),
        "task": whole_numbers(table.column("task_index"), f"{path}, task_index", null=-1),
        "intervention": truths(table, corrected, path) if corrected else np.zeros(len(table)),
    }
    unknown = np.isnan(columns["intervention"])
    if unknown.any():
        episode, frame = (columns[name][int(np.argmax(unknown))] for name in ("episode", "frame"))
        raise ValueError(
            f"{path}: {corrected} does not say whether anybody corrected episode {episode}, frame {frame}: write 0 or 1"
        )
    return columns
