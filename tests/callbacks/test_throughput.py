"""The share of the hardware's rate: of what is computed in truth, and of a rate that the device has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.profiling.rate import matmul_rate, peak_rate
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.throughput import Throughput, Work, count_flops, training_dtypes
from tests.quiet_trainer import quiet_trainer

# batches of one modality each, so that samples of two cameras follow on samples of one
MIXTURE = {"robot/continuous_robot_actions": 0.4, "robot/qa": 0.4, "robot/hl_subtask": 0.2}


class Flops(Callback):
    """What PyTorch counts in every step, and what its shapes say."""

    def __init__(self) -> None:
        self.counted, self.on_meta, self.samples = list[int](), list[int](), list[int]()
        self.work = list[float]()
        self.counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, *args: Any) -> None:
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counter.__exit__(None, None, None)
        self.counted.append(self.counter.get_total_flops())
        stage = pl_module.recipe.at(trainer.global_step - 1)
        model = pl_module.blueprint.blank(stage)
        self.work.append(Work.of(model).cost(batch, pl_module))
        self.on_meta.append(count_flops(model, batch, stage, pl_module.knowledge_insulation))
        self.samples.append(len(batch))


def train(videos: Path, folder: Path, *callbacks: Callback, size: str = "debug", **module_options: Any) -> Trainer:
    seed_everything(0)
    stages = StageSwitch(0, 12, posttrain=StageOptions(LossWeights(text=1, subtask=1, flow=1), MIXTURE))
    data = Pi05DataModule({"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}, batch_size=4, num_workers=0)
    logger = CSVLogger(folder, name="", version="")
    trainer = quiet_trainer(stages, *callbacks, logger=logger, log_every_n_steps=2)
    trainer.fit(Pi05Module(ModelConfig.preset(size), flow_draws=2, **module_options), data)
    return trainer


@pytest.mark.slow
def test_flops_of_unlike_batches_follow_from_one_of_them(videos: Path, tmp_path: Path) -> None:
    flops = Flops()
    train(videos, tmp_path, flops, size="tiny")
    per_work = torch.tensor(flops.counted) / torch.tensor(flops.work)
    per_sample = torch.tensor(flops.counted) / torch.tensor(flops.samples)
    assert per_sample.max() / per_sample.min() > 1.4
    assert per_work.max() / per_work.min() < 1.2


def columns(folder: Path) -> set[str]:
    return set((folder / "metrics.csv").read_text().splitlines()[0].split(","))


def test_share_is_logged_where_flops_and_rate_are_known(videos: Path, tmp_path: Path) -> None:
    train(videos, tmp_path, Throughput())
    assert {"throughput/hardware_share", "throughput/samples_per_second"} <= columns(tmp_path)


def test_compilation_hides_no_flops(videos: Path, tmp_path: Path) -> None:
    with torch._dynamo.config.patch(disable=True):  # the option, without minutes of compilation
        train(videos, tmp_path, Throughput(), compile=True)
    assert "throughput/hardware_share" in columns(tmp_path)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "options", [{}, {"knowledge_insulation": True}, pytest.param({"lora": Lora()}, marks=pytest.mark.slow)], ids=str
)
def test_flops_are_counted_beside_the_step_as_in_it(videos: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    flops = Flops()
    with sdpa_kernel(SDPBackend.MATH):  # of its own operation for attention on CPUs PyTorch does not know the FLOPs
        train(videos, tmp_path, flops, **options)
    assert flops.on_meta == flops.counted


@pytest.mark.parametrize(
    ("precision", "dtypes"),
    [
        ("32-true", {torch.float32}),
        ("bf16-mixed", {torch.float32, torch.bfloat16}),
        ("16-mixed", {torch.float32, torch.float16}),
        ("transformer-engine", set()),
        ("transformer-engine-float16", set()),
    ],
)
def test_rate_is_of_every_type_that_is_computed_in(precision: str, dtypes: set[torch.dtype]) -> None:
    assert training_dtypes(Pi05Module(ModelConfig.preset("debug")), precision) == dtypes


def test_peak_is_that_of_the_fastest_type() -> None:
    both = peak_rate([torch.float16, torch.float32])  # fp16 is slow on most CPUs, and parts stay in fp32
    assert both > 0.5 * max(matmul_rate(dtype, size=768) for dtype in (torch.float16, torch.float32))
