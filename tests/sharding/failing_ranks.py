"""Ranks of `pi05 fit` that fail in the middle of training, each as it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.data.sources.base import Source
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.split import Split
from pi05_lightning.types import Shapes

STEP = 2
PATIENCE = 300
LOOSE = "the camera's cable is loose"


@dataclass(frozen=True)
class Apart(LeRobotConfig):
    """A dataset that is another one to a rank, as on another machine.  path_there: to rank `rank`."""

    rank: int = -1
    path_there: str = ""

    def open(self, name: str, split: Split, shapes: Shapes) -> Source:
        here = {field.name: getattr(self, field.name) for field in fields(LeRobotConfig)}
        own = LeRobotConfig(**here)
        there = int(os.environ.get("LOCAL_RANK", "0")) == self.rank
        return (replace(own, path=self.path_there) if there else own).open(name, split, shapes)


class Failing(Callback):
    """fates: by rank: `killed`, `raises` or `hangs`."""

    def __init__(self, fates: dict[int, str]) -> None:
        self.fates = fates

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        fate = self.fates.get(trainer.global_rank)
        if trainer.global_step < STEP or fate is None:
            return
        Path(trainer.default_root_dir, "failed").touch()
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fate == "raises":
            raise RuntimeError(LOOSE)
        else:
            time.sleep(2 * PATIENCE)


def fates(**by_rank: str) -> list[str]:
    """The flags with which the ranks rank0, rank1, … fail."""
    told = ", ".join(f"{name.removeprefix('rank')}: {fate}" for name, fate in by_rank.items())
    return ["--trainer.callbacks", f"[{{class_path: failing_ranks.Failing, init_args: {{fates: {{{told}}}}}}}]"]


def since_failure(run: Path) -> float:
    """Seconds."""
    return time.time() - (run / "failed").stat().st_mtime


def end_of(command: list[str], **environment: str) -> tuple[int, str]:
    """Exit code, and what was printed until the last of all processes was gone."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)  # all of them hold the pipe
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output
