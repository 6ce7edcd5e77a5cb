from __future__ import annotations

from pathlib import Path

import pytest

from pi05_lightning.sim.metaworld.collect import collect
from pi05_lightning.sim.metaworld.config import CollectConfig

TASKS = ("reach-v3", "drawer-open-v3")


def config(out: Path, **changes) -> CollectConfig:
    small = {"tasks": TASKS, "episodes": 3, "val_episodes": 1, "scenes": 2, "num_workers": 1}
    return CollectConfig(out, **small | changes)


@pytest.fixture(scope="session")
def collected(tmp_path_factory) -> Path:
    return collect(config(tmp_path_factory.mktemp("collect") / "data"))


@pytest.fixture(scope="session")
def untrained(collected, tmp_path_factory) -> Path:
    """An exported policy for the collected data, as chance made it."""
    from pi05_lightning import Pi05DataModule
    from pi05_lightning.data.sources.lerobot import LeRobotConfig
    from pi05_lightning.models.config import ModelConfig
    from pi05_lightning.models.pi05 import Pi05
    from pi05_lightning.weights.folder import save

    sizes = ModelConfig.preset("debug")
    data = Pi05DataModule({"robot": LeRobotConfig(str(collected / "robot"))}, shapes=sizes.shapes)
    model = Pi05(sizes)
    model.reset_parameters()
    folder = tmp_path_factory.mktemp("untrained")
    save(folder, model, data.processor)
    return folder
