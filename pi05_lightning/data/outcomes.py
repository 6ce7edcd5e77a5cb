"""How episodes ended, as a person said afterwards: a file beside a dataset's metadata, of which nothing changes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pi05_lightning.files.local import read_json

OUTCOMES = Path("meta", "pi05_outcomes.json")
"""In a dataset's folder: {episode: {"success": …, "frames": how many it had}}, written by `pi05 outcomes`."""
SUCCESS = "success"
"""The column of meta/episodes that says whether an episode succeeded."""


def with_outcomes(episodes: pa.Table, root: Path) -> pa.Table:
    """The table of episodes with what a person said in its column `success`; of others, what was recorded, or null.

    Raises ValueError where the file is of other episodes.
    """
    said = read_outcomes(root)
    if not said:
        return episodes
    frames = dict(zip(episodes["episode_index"].to_pylist(), episodes["length"].to_pylist(), strict=True))
    if other := next((number for number, about in said.items() if frames.get(number) != about["frames"]), None):
        raise ValueError(
            f"{root / OUTCOMES} is of other episodes: {other} had {said[other]['frames']} frames, and now has"
            f" {frames.get(other, 'none')}. Remove that file, and say with `pi05 outcomes` how these ended"
        )
    recorded = episodes[SUCCESS].to_pylist() if SUCCESS in episodes.column_names else [None] * len(episodes)
    values = [said[n][SUCCESS] if n in said else before for n, before in zip(frames, recorded, strict=True)]
    success = pa.array([None if value is None else bool(value) for value in values], pa.bool_())
    others = [name for name in episodes.column_names if name != SUCCESS]
    return episodes.select(others).append_column(SUCCESS, success)


def read_outcomes(root: Path) -> dict[int, dict[str, int]]:
    """What was said of a dataset's episodes, by their numbers."""
    return {int(number): about for number, about in read_json(root / OUTCOMES, default={}).items()}
