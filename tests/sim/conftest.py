from __future__ import annotations

from pathlib import Path

import pytest

from pi05_lightning.sim.collect import collect
from pi05_lightning.sim.config import CollectConfig

TASKS = ("reach-v3", "drawer-open-v3")


def config(out: Path, **changes) -> CollectConfig:
    small = {"tasks": TASKS, "episodes": 3, "val_episodes": 1, "scenes": 2, "num_workers": 1}
    return CollectConfig(out, **small | changes)


@pytest.fixture(scope="session")
def collected(tmp_path_factory) -> Path:
    return collect(config(tmp_path_factory.mktemp("collect") / "data"))
