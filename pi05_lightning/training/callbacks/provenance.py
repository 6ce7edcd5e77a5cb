"""Where a run came from: commit, command, versions, hardware and data, as `pi05 report` shows them."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from pi05_lightning import __version__
from pi05_lightning.data.datamodule import Pi05DataModule, Samples, datamodule_of
from pi05_lightning.data.split import Split
from pi05_lightning.evaluation.report.run import PROVENANCE
from pi05_lightning.files.local import write_json
from pi05_lightning.files.shipped import ROOT
from pi05_lightning.models.quantized import values_of
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import leaves_nothing


class Provenance(Callback):
    """Writes provenance.json into the run with its first batch; a resumed run's is that of its last start."""

    _is_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = not leaves_nothing(trainer)

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self._is_due:
            return
        assert isinstance(pl_module, Pi05Module)
        self._is_due = False
        data = datamodule_of(trainer)
        content = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "from step": trainer.global_step,
            "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "pi05"), *sys.argv[1:]]),
            "commit": commit(ROOT),
            "versions": {
                "pi05_lightning": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "hardware": f"{trainer.world_size} × {device_name(pl_module.device)}",
            "parameters": sum(values_of(pl_module).values()),
            "samples": sizes(data),
            "hub": {
                "init_from": pl_module.begun_with,
                "data": {name: source.hub_id for name, source in data.sources("train").items() if source.hub_id},
            },
        }
        write_json(Path(trainer.default_root_dir) / PROVENANCE, content)


def sizes(data: Pi05DataModule) -> dict[str, dict[str, int]]:
    """`source/modality` -> samples to train on and to validate on."""
    table: dict[str, dict[str, int]] = {}
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        for entry in Samples(data.sources(split), data.processor).entries:
            table.setdefault(str(entry.subset), dict.fromkeys(splits, 0))[split] = entry.size
    return table


def commit(checkout: Path) -> str | None:
    """The commit that a checkout is at, with `+` where files differ from it; None for what is no checkout."""
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True).stdout.strip()

    found = git("rev-parse", "HEAD")
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if found else None


def device_name(device: torch.device) -> Any:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " " + device.type
