"""Exact statistics of a dataset by `pi05 stats`' engine, against LeRobot's own computation on the same files."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from lerobot.datasets.dataset_tools import recompute_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from benchmarks.harness import Options, Row, alternate, run_part, speed_up
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.statistics import FeatureStats

KEYS = ("observation.state", "action")
WIDTH = 14


def stats(options: Options) -> list[Row]:
    """Statistics of states and actions, 14 dims each, against LeRobot's."""
    episodes, length = (4, 50) if options.quick else (200, 500)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        record(root, episodes, length)
        check(root)

        def peer() -> dict[str, dict]:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                return recompute_stats(LeRobotDataset("bench/stats", root=root)).meta.stats

        theirs = peer()
        for key, found in compute(root).items():
            # what both define alike; LeRobot's quantiles are means over episodes, which are not the dataset's
            for name in ("mean", "std", "min", "max"):
                np.testing.assert_allclose(getattr(found, name), theirs[key][name], rtol=1e-4, atol=1e-5)
        seconds = alternate(peer, lambda: compute(root), options.pairs)
    name = f"statistics of {episodes * length:,} frames, 2 × {WIDTH} dims, {episodes} episodes"
    return [speed_up(name.replace(",", " ", 1), ">= 10", seconds)]


def record(root: Path, episodes: int, length: int) -> None:
    """A LeRobot v3 dataset of random walks, written by LeRobot."""
    logging.disable(logging.INFO)
    features = {key: {"dtype": "float32", "shape": (WIDTH,), "names": None} for key in KEYS}
    dataset = LeRobotDataset.create("bench/stats", 50, features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        walk = rng.normal(size=(length + 1, WIDTH)).cumsum(0).astype(np.float32) / 10
        for now, after in pairwise(walk):
            dataset.add_frame({KEYS[0]: now, KEYS[1]: after, "task": "walk"})
        dataset.save_episode()
    dataset.finalize()


def compute(root: Path) -> dict[str, FeatureStats]:
    """As `pi05 stats` does, over all episodes."""
    source = LeRobotSource(LeRobotConfig(str(root), val_fraction=0), "bench", "train", horizon=50, image_size=(0, 0))
    return dict(zip(KEYS, source.statistics(), strict=True))


def check(root: Path) -> None:
    """Ours is what numpy says of the full columns, to 1e-6."""
    table = pq.read_table(root / "data", columns=list(KEYS))
    for key, found in compute(root).items():
        column = np.array(table[key].to_pylist(), dtype=np.float64)
        expected = {"mean": column.mean(0), "std": column.std(0), "min": column.min(0), "max": column.max(0)}
        expected |= {"q01": np.quantile(column, 0.01, axis=0), "q99": np.quantile(column, 0.99, axis=0)}
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, atol=1e-6)
    print("  equal to numpy on the full columns to 1e-6", flush=True)


if __name__ == "__main__":
    run_part(stats)
