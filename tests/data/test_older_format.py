"""A dataset of LeRobot's format v2.1: refused with a command that converts it, as it stands."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.data.recorded import LENGTHS, data_file, open_source


def as_v21(root: Path, folder: Path) -> None:
    """The recorded dataset as LeRobot wrote it before v3: a file for each episode, metadata as JSON lines."""
    table = pq.read_table(data_file(root))
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    tasks = ["close the drawer", "open the drawer"]
    lines: dict[str, list] = {"tasks": [{"task_index": i, "task": task} for i, task in enumerate(tasks)]}
    state = {"min": [0.0], "max": [1.0], "mean": [0.5], "std": [0.1]}
    for episode, length in enumerate(LENGTHS):
        rows = table.filter(pc.field("episode_index") == episode)
        pq.write_table(rows, folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
        about = {"episode_index": episode, "tasks": [tasks[episode % 2]], "length": length}
        lines.setdefault("episodes", []).append(about)
        stats = {"timestamp": state | {"count": [length]}}
        lines.setdefault("episodes_stats", []).append({"episode_index": episode, "stats": stats})
    for name, values in lines.items():
        (folder / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    info = json.loads((root / "meta" / "info.json").read_text()) | {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "total_chunks": 1,
        "total_videos": 0,
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))


@pytest.mark.slow
def test_the_command_that_is_named_converts_it(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my robot"
    as_v21(pictures, folder)
    with pytest.raises(ValueError, match=r"format v2\.1, and v3 is needed: convert it with") as refused:
        open_source(folder)
    (command,) = [line for line in str(refused.value).splitlines() if line.startswith("python ")]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, timeout=300)
    found, expected = open_source(folder, cameras=None), open_source(pictures, cameras=None)
    assert len(found) == len(expected)
    for index in (0, 20, 53):
        assert found[index].task == expected[index].task
        np.testing.assert_array_equal(found[index].actions, expected[index].actions)
        np.testing.assert_array_equal(found[index].images["top"], expected[index].images["top"])
