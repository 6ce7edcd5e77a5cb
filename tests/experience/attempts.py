"""Attempts as a robot's recordings have them, made of the recorded episodes, and how rounds are trained on some."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.experience.rounds import Training

TRAINING = Training(steps=7, batch_size=4, lr=1e-3, demonstrations_share=0.4, omission=0.2)
SUCCESSES = [0, 3]  # episodes
LENGTHS = (12, 9, 15, 7, 11)  # of the recorded episodes; those of odd number are of another task


def recorded_attempts(pictures: Path, to: Path) -> Path:
    """Episodes of which the third failed, and in which frames 5 and later of the second are corrections."""
    root = shutil.copytree(pictures, to, ignore=shutil.ignore_patterns("pi05_*"))
    (path,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    places = [(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    columns = {
        "next.success": [episode != 2 and frame == LENGTHS[episode] - 1 for episode, frame in places],
        "intervention": [episode == 1 and frame >= 5 for episode, frame in places],
    }
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.bool_()))
    pq.write_table(table, path)
    return root
