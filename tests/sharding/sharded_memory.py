"""How much memory a rank takes while its part of a model is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from sharded_runs import train

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.main import main
from pi05_lightning.models.config import GemmaConfig, ModelConfig

LARGE = replace(
    ModelConfig.preset("debug"),
    language=GemmaConfig(width=512, depth=6, mlp_dim=8192, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=6, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
)
"""300 MB in fp32, of which no layer has more than 17."""


class Memory(Callback):
    """The peak, between the making of the model and the first step, over what the process had before."""

    taken = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        self.taken = -status("VmRSS")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.taken += status("VmHWM")
        trainer.should_stop = True


def status(key: str) -> int:
    """Of this process, in bytes; pages that are mapped from files and were read count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def taken(dataset: str, fast: str, ranks: int, init_from: str | None) -> int:
    """By a model that begins at random, or from weights on disk."""
    train(dataset, fast, ranks, steps=(0, 1))  # so that everything is imported
    memory, module = Memory(), {"init_from": init_from}
    train(dataset, fast, ranks, model=LARGE, steps=(0, 1), decay=None, callbacks=[memory], module=module)
    return memory.taken


ONE = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.callbacks", "null"]


def taken_to_open(how: str, run: str, small: str, folder: str) -> int:
    """By one process that opens a sharded run for a use of it."""

    def use(path: str) -> None:
        if how == "policy":
            Pi05Policy.from_pretrained(path, device="cpu")
        elif how == "convert":
            main(["convert", "--source", path, "--target", f"{folder}/{Path(path).name}-converted"])
        else:
            out = ["--run", f"{folder}/{Path(path).name}-validated", "--trainer.limit_val_batches", "1"]
            main(["validate", path, *out, *ONE])

    use(small)  # so that everything is imported
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    use(run)
    return status("VmHWM") - before
