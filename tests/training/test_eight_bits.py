"""torchao's AdamW, whose state has 8 bits a value: trained with, saved, and gone on with exactly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint

Train = Callable[..., Trainer]
READ = """
import sys
from pathlib import Path
from pi05_lightning.weights.sharded_checkpoint import load
print(load(Path(sys.argv[1]))["global_step"])
"""


@pytest.fixture
def fit(train: Train, tmp_path: Path) -> Train:
    """Train in one folder, or go on with its newest checkpoint, as `pi05 fit` does."""

    def run(folder: str, lr: float = 1e-3, **options: Any) -> Trainer:
        saving = RunCheckpoint(dirpath=tmp_path / folder, every_n_train_steps=1)
        return train(saving, module_options={"optimizer": partial(AdamW8bit, lr=lr)}, **options)

    return run


def numbers(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state by the place that they have in it, quantised ones in their parts."""
    found = {}
    for number, values in state.items():
        for key, value in values.items():
            parts = value.__tensor_flatten__()[0] if isinstance(value, OptimState8bit) else ()
            found |= {f"{number}.{key}.{part}": getattr(value, part) for part in parts} or {f"{number}.{key}": value}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_exactly(fit: Train, tmp_path: Path, is_compiled: bool) -> None:
    last = tmp_path / "stopped" / "last.ckpt"
    with torch.compiler.set_stance("default" if is_compiled else "force_eager"):
        fit("whole")
        fit("stopped", max_steps=2)
        fit("stopped", max_steps=4, ckpt_path=last)
        fit("stopped", ckpt_path=last)
    whole, resumed = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "stopped"))
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    (then,), (now,) = (checkpoint["optimizer_states"] for checkpoint in (whole, resumed))
    assert [float(group["lr"]) for group in now["param_groups"]] == [float(g["lr"]) for g in then["param_groups"]]
    expected, found = numbers(then["state"]), numbers(now["state"])
    assert any(".codes" in name for name in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_its_checkpoint_is_read_where_nobody_has_imported_torchao(fit: Train, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        fit("run", max_steps=1)
    read = [sys.executable, "-c", READ, str(tmp_path / "run" / "last.ckpt")]
    assert subprocess.run(read, capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_changed_rate_counts_from_the_first_step_on(fit: Train, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        fit("run", max_steps=4)
        trainer = fit("run", lr=5e-4, max_steps=5, ckpt_path=tmp_path / "run" / "last.ckpt")
    groups = trainer.optimizers[0].param_groups
    assert [float(group["initial_lr"]) for group in groups] == pytest.approx([5e-4] * len(groups))
    assert all(float(group["lr"]) < 5e-4 for group in groups)
