"""The datasets that conftest records, opened and changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.split import Split
from pi05_lightning.types import Shapes

HORIZON = 8
SHAPES = Shapes(image_size=32, horizon=HORIZON, action_dim=5, vocab_size=300, fast_vocab_size=32, fast_skip_tokens=0)
LENGTHS = (12, 9, 15, 7, 11)  # of the episodes that conftest records
STARTS = np.cumsum((0, *LENGTHS))


def open_source(root: Path, split: Split = "train", **options) -> LeRobotSource:
    options = {"val_fraction": 0, "cameras": {}, **options}
    return LeRobotConfig(path=str(root), **options).open("robot", split, SHAPES)


def data_file(root: Path) -> Path:
    return root / "data/chunk-000/file-000.parquet"


def rewrite(path: Path, **columns: list | None) -> None:
    """Replace columns of a parquet file, or drop those given as None."""
    table = pq.read_table(path)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        if values is not None:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)


def edit_info(root: Path, **values) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
