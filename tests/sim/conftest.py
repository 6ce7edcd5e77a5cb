from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.sim.demonstrations.kept import KEPT

TASKS = ("reach-v3", "drawer-open-v3")


def config(out: Path, **changes) -> CollectConfig:
    small = {"tasks": TASKS, "episodes": 3, "val_episodes": 1, "num_workers": 1}
    of_experts = {} if "policy" in changes else {"scenes": 2}
    return CollectConfig(out, **small | of_experts | changes)


def interrupted_by(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[list[str]]:
    """Of each collection from now on, which pieces it found; it keeps one, and is interrupted.

    module: of which `write_dataset` is called.
    """
    found = list[list[str]]()

    def write_dataset(root: Path, *_: object) -> None:
        kept = root.with_name(KEPT)
        found.append([piece.name for piece in kept.glob("*.pickle")])
        (kept / "episodes-0.pickle").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_dataset", write_dataset)
    return found


@pytest.fixture(scope="session")
def collected(tmp_path_factory) -> Path:
    return collect(config(tmp_path_factory.mktemp("collect") / "data"))


@pytest.fixture(scope="session")
def untrained(collected, tmp_path_factory) -> Path:
    from tests.untrained import untrained_policy

    return untrained_policy(tmp_path_factory.mktemp("untrained"), collected / "robot")


@pytest.fixture(scope="session")
def fast_policy(collected, tmp_path_factory) -> Path:
    """A checkpoint of the demo's size that was trained for a step, on FAST tokens alone."""
    from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
    from pi05_lightning.data.sources.lerobot import LeRobotConfig
    from pi05_lightning.models.config import ModelConfig
    from pi05_lightning.recipe import LossWeights, StageOptions
    from tests.quiet_trainer import quiet_trainer
    from tests.random_fast import random_fast

    sizes, folder = ModelConfig.preset("tiny"), tmp_path_factory.mktemp("fast_policy")
    random_fast(sizes, dims=4).save(folder / "fast")
    switch = StageSwitch(1, 0, pretrain=StageOptions(LossWeights(fast=1)))
    trainer = quiet_trainer(switch, default_root_dir=folder)
    sources = {"robot": LeRobotConfig(str(collected / "robot"))}
    trainer.fit(Pi05Module(sizes), Pi05DataModule(sources, batch_size=2, num_workers=0, fast=folder / "fast"))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder
