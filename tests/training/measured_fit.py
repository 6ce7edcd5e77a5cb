"""`pi05 fit` as a process of its own that says what its memory was forecast to be, and what it came to be.

`python measured_fit.py OPTIONS OF FIT` prints a last line of JSON: bytes that were forecast, and by which the resident
memory grew from there on at most.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.cli import run
from pi05_lightning.training.callbacks.forecast import Forecaster


def resident(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


class Measure(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.forecast = Forecaster(trainer, pl_module, False).of({}).total  # type: ignore[arg-type]
        self.before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here


if __name__ == "__main__":
    measure = Measure()
    defaults = run.default_callbacks
    run.default_callbacks = lambda: [measure, *defaults()]
    run.run("fit", sys.argv[1:])
    print(json.dumps({"forecast": measure.forecast, "measured": resident("VmHWM") - measure.before}))
