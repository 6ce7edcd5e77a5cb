"""What a run will need is counted before it is loaded: by category as it then is, and a run that cannot fit stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.cli.main import main
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.profiling.forecast import Memory
from pi05_lightning.profiling.free import free_memory, left_by_cgroups
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.forecast import Forecaster, MemoryForecast

SCRIPT = Path(__file__).with_name("measured_fit.py")
SGD = partial(torch.optim.SGD, lr=1e-3)
DRAW = 20_000  # bytes, at least, that a noise draw of the debug model needs


class Held(Callback):
    """The forecast of the last stage, and what is held at its last step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.forecaster = Forecaster(trainer, pl_module, False)  # type: ignore[arg-type]
        self.forecast = self.forecaster.stages({})["posttrain"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = sum(p.nbytes for p in pl_module.parameters())
        states = trainer.optimizers[0].state.values()
        self.optimizer = sum(x.nbytes for state in states for x in state.values() if isinstance(x, torch.Tensor))
        self.average = sum(x.nbytes for x in pl_module.average.values())  # type: ignore[union-attr]


class StopBeforeTraining(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise InterruptedError("it went on")


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("options", "precision"),
    [({}, "32-true"), ({"lora": Lora(rank=4)}, "bf16-true"), ({"optimizer": SGD, "compile": False}, "bf16-mixed")],
    ids=["AdamW", "LoRA in bf16", "SGD in mixed precision"],
)
def test_weights_gradients_state_and_average_are_forecast_to_the_byte(
    train: Callable[..., Trainer], options: dict[str, Any], precision: str
) -> None:
    held = Held()
    train(held, WeightAverage(0.9), module_options=options, precision=precision)
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(held.forecast, part) == getattr(held, part), part
    assert 0 < held.forecast.activations < held.forecaster.bound()


@pytest.mark.slow
def test_checkpointing_needs_less_for_activations(train: Callable[..., Trainer]) -> None:
    held = Held()
    train(held, max_steps=1, data_options={"batch_size": 8})
    checkpointed = held.forecaster.stages({"activation_checkpointing": True})["posttrain"]
    assert checkpointed.activations < 0.9 * held.forecast.activations


@pytest.fixture
def too_large(videos: Path, tmp_path: Path) -> Path:
    """A run whose noise draws need twice the memory that is free."""
    robot = {"path": str(videos), "val_fraction": 0.2}
    stages = {
        "pretrain_steps": 0,
        "posttrain_steps": 2,
        "posttrain": {"losses": {"subtask": 0, "flow": 1}},
    }
    content = {
        "model": {"config": "debug", "flow_draws": 2 * free_memory(torch.device("cpu")) // (16 * DRAW)},
        "data": {
            "sources": {
                "robot": {"class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig", "init_args": robot}
            },
            "batch_size": 16,
            "num_workers": 0,
        },
        "stages": stages,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "config.yaml"


@pytest.mark.slow
def test_run_that_cannot_fit_stops_and_names_what_would(too_large: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the run needs .* GiB are free") as refused:
        main(["fit", "-c", str(too_large), "--run", str(tmp_path / "run")])
    assert "--force goes on" in str(refused.value)
    assert "--data.batch_size" in str(refused.value)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_force_goes_on(train: Callable[..., Trainer]) -> None:
    draws = 2 * free_memory(torch.device("cpu")) // (4 * DRAW)
    with pytest.raises(InterruptedError, match="it went on"):
        train(MemoryForecast(force=True), StopBeforeTraining(), module_options={"flow_draws": draws})


def test_a_run_is_stopped_only_beyond_the_margin() -> None:
    memory = Memory(weights=50, gradients=50, optimizer=0, average=0, activations=0)
    assert memory.fits(86)
    assert not memory.fits(84)


def test_limits_of_control_groups_count_less_what_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "job" / "step").mkdir(parents=True)
    for folder, limit in (("", "max"), ("job", "1000"), ("job/step", "5000")):
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text("600\n")
        (tmp_path / folder / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert sorted(left_by_cgroups(tmp_path, own)) == [500, 4500]


MID = {
    "backbone_type": "siglip_gemma",
    "vision": {"image_size": 224, "patch_size": 14, "width": 256, "depth": 4, "mlp_dim": 2048, "num_heads": 16},
    "language": {"width": 768, "depth": 4, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
    "expert": {"width": 256, "depth": 4, "mlp_dim": 1024, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
    "vocab_size": 4096,
    "horizon": 8,
    "action_dim": 6,
}
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""glibc gives back all that is larger than so many bytes; with adapters in bf16 it else keeps 1 GB, of 1.6 GB."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("options", "allocator"),
    [
        ("", {}),
        ("--model.activation_checkpointing true --ema.decay 0.9 --trainer.accumulate_grad_batches 2", {}),
        ("--trainer.precision bf16-true", {}),
        ("--trainer.precision bf16-mixed", {}),
        pytest.param("--model.lora.rank 16", {}, marks=pytest.mark.xfail(reason="the forecast is 23 % too low")),
        ("--model.lora.rank 16 --trainer.precision bf16-true --model.activation_checkpointing true", NOTHING_KEPT),
    ],
)
def test_peak_of_a_real_run_is_forecast_within_15_percent(
    too_large: Path, tmp_path: Path, options: str, allocator: dict[str, str]
) -> None:
    content = yaml.safe_load(too_large.read_text())
    content["model"] = {"config": MID}
    content["data"]["batch_size"] = 6
    too_large.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(SCRIPT), "-c", str(too_large), "--run", str(tmp_path / "run"), *options.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | allocator
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["forecast"] == pytest.approx(found["measured"], rel=0.15)
