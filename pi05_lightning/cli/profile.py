"""`pi05 profile`: what a configuration costs, before a GPU is rented: parameters, FLOPs, bytes, memory, time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from pi05_lightning.files.shipped import find_config
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import checkpoint_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.profiling.parts import (
    PARTS,
    Book,
    Clock,
    Counter,
    Work,
    activation_peak,
    chunk,
    parameters_of,
    training_step,
)

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30
console = Console()


@dataclass(frozen=True)
class Accelerator:
    """Published peak rates, dense (no sparsity): matrix products in FLOP/s, memory in bytes/s, capacity in bytes."""

    bf16: float
    fp32: float
    """TF32 for NVIDIA's tensor cores."""
    bandwidth: float
    memory: float
    source: str


ACCELERATORS = {
    "rtx4090": Accelerator(165e12, 83e12, 1.008e12, 24e9, "NVIDIA Ada GPU Architecture whitepaper, appendix A"),
    "l40s": Accelerator(362e12, 183e12, 0.864e12, 48e9, "NVIDIA L40S datasheet"),
    "a100": Accelerator(312e12, 156e12, 2.039e12, 80e9, "NVIDIA A100 datasheet, 80 GB SXM"),
    "h100": Accelerator(989e12, 494e12, 3.35e12, 80e9, "NVIDIA H100 datasheet, SXM"),
    "h200": Accelerator(989e12, 494e12, 4.8e12, 141e9, "NVIDIA H200 datasheet, SXM"),
}


def profile(
    configuration: list[str] | str,
    batch_size: int | None = None,
    cameras: int = 2,
    prompt_tokens: int = 60,
    target_tokens: int = 50,
    draws: int | None = None,
    num_steps: int = 10,
    precision: Precision | None = None,
    activation_checkpointing: bool | None = None,
    accelerator: Literal["rtx4090", "l40s", "a100", "h100", "h200"] = "h100",
    utilization: float = 0.4,
    measure: bool = True,
) -> None:
    """What a training step and an action chunk of a configuration cost, by part.

    FLOPs, bytes and memory are counted without memory for the model; seconds are measured on this machine where the
    model fits, with random weights. Options that are left out come from the configuration.

    Args:
        configuration: a model size (`base`), its YAML, or the YAML of a run; several as [a, b], later ones win.
        batch_size: samples per step.
        cameras: images per sample.
        prompt_tokens: of each sample.
        target_tokens: text and FAST tokens that each sample predicts; 0 for flow matching alone.
        draws: noise draws per sample.
        num_steps: Euler steps of a chunk.
        precision: fp32, or bf16 compute over fp32 weights.
        activation_checkpointing: keep only each block's input for the backward pass.
        accelerator: whose published rates the estimate takes.
        utilization: share of the peak matrix rate that the estimate assumes.
        measure: whether to time it on this machine.

    Raises ValueError for configurations that cannot be read, and sizes that make no step.
    """
    counts = [n for n in (batch_size, prompt_tokens, draws, num_steps) if n is not None]
    if min(cameras, target_tokens) < 0 or min(counts) < 1:
        raise ValueError("batch_size, prompt_tokens, draws and num_steps are at least 1, cameras and target_tokens 0")
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}: it is a share, above 0 and at most 1")
    model_config, settings = read_config([configuration] if isinstance(configuration, str) else configuration)
    if model_config.backbone_type == "keypoint_gemma" and cameras > model_config.vision.max_cameras:
        raise ValueError(f"cameras is {cameras}, and this model was made for {model_config.vision.max_cameras} at most")
    run, data, trainer = (settings.get(key) or {} for key in ("model", "data", "trainer"))
    work = Work(
        batch_size=batch_size or data.get("batch_size", 1),
        cameras=cameras,
        prompt_tokens=prompt_tokens,
        target_tokens=target_tokens,
        draws=draws or run.get("flow_draws", 1),
        insulate=run.get("knowledge_insulation", False),
    )
    if precision is None:
        precision = "bf16" if "bf16" in str(trainer.get("precision", "")) else "fp32"
    if activation_checkpointing is None:
        activation_checkpointing = run.get("activation_checkpointing", False)
    how = f"{precision}{', activation checkpointing' if activation_checkpointing else ''}"
    console.print(
        f"batch {work.batch_size}, {cameras} cameras, {prompt_tokens} prompt and {target_tokens} predicted tokens,"
        f" noise draws: {work.draws}, horizon {model_config.horizon}, {how}",
        highlight=False,
    )
    plan = Plan(model_config, work, num_steps, activation_checkpointing, DTYPES[precision])
    step, one_chunk = plan.count(train=True), plan.count(train=False)
    memory = plan.memory()
    console.print(_cost_table("training step", plan, step, ACCELERATORS[accelerator], utilization))
    console.print(
        _cost_table(f"one action chunk, {num_steps} steps", plan, one_chunk, ACCELERATORS[accelerator], utilization)
    )
    console.print(_memory_table(memory))
    chosen = ACCELERATORS[accelerator]
    fits = "fits" if sum(memory.values()) < chosen.memory else "does not fit"
    console.print(
        f"On one {accelerator} ({chosen.source}) the step {fits} into {chosen.memory / 1e9:.0f} GB. The estimates take"
        f" the larger of FLOPs at {utilization:.0%} of the peak and bytes at full bandwidth; bytes are those of unfused"
        " operations, so fused kernels need less.",
        highlight=False,
    )
    if not measure:
        return
    needed, free = sum(memory.values()), _free_memory()
    if needed > free:
        console.print(f"Not timed here: a step needs {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free.")
        return
    rate = matmul_rate(plan.dtype, plan.device)
    console.print(f"A plain matrix product reaches {rate / 1e9:,.0f} GFLOP/s on this machine.", highlight=False)
    for name, train, counter in (
        ("training step", True, step),
        (f"one action chunk, {num_steps} steps", False, one_chunk),
    ):
        console.print(_time_table(name, plan.measure(train), counter, rate))


@dataclass(frozen=True)
class Plan:
    """A model and a step's data, to be counted, tracked and timed."""

    config: ModelConfig
    work: Work
    num_steps: int
    checkpointing: bool
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, device: torch.device | str) -> Pi05:
        with torch.device("meta"):
            model = Pi05(self.config)
        if self.checkpointing:
            checkpoint_blocks(model)
        if torch.device(device).type != "meta":
            model.to_empty(device=device)
            model.reset_parameters()
        return model

    def run(self, model: Pi05, device: torch.device | str, train: bool, book: Book) -> None:
        # a robot asks for one chunk at a time, and there is nothing to predict
        work = self.work if train else replace(self.work, batch_size=1, target_tokens=0, draws=1)
        batch, kind = work.batch(self.config, device), torch.device(device).type
        casts = self.dtype != torch.float32 and kind != "meta"
        with torch.autocast(kind, self.dtype) if casts else nullcontext():
            if train:
                training_step(model, batch, work, book)
            else:
                chunk(model, batch, self.num_steps, book)

    def count(self, train: bool) -> Counter:
        """FLOPs and bytes by part, without memory."""
        # autocast knows no meta tensors: everything in the compute's dtype is what its bytes come close to
        model, counter = self.model("meta").to(self.dtype), Counter()
        with counter:
            self.run(model, "meta", train, counter)
        return counter

    def memory(self) -> dict[str, float]:
        """Bytes of a training step by category, with AdamW."""
        model = self.model("meta")
        weights = sum(p.nbytes for p in model.parameters())
        peak = activation_peak(model, lambda: self.run(model, "cpu", True, Book()), FakeTensorMode())
        return {"weights": weights, "gradients": weights, "optimizer (AdamW)": 2 * weights, "activations, peak": peak}

    def measure(self, train: bool, repeats: int = 3) -> dict[str, float]:
        """Seconds by part on this machine, the medians of a few runs after one to warm up."""
        model, clocks = self.model(self.device), []
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        for _ in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            clocks.append(Clock(synchronize))
            self.run(model, self.device, train, clocks[-1])
        return {part: statistics.median(clock.seconds[part] for clock in clocks[1:]) for part in PARTS}


def read_config(names: Sequence[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """A model's dimensions, and the run's settings around them, from files merged in order.

    Each is a shipped model size, the YAML of a model, or that of a run.  Raises ValueError where none names dimensions.
    """
    settings: dict[str, Any] = {}
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            dimensions: Any = ModelConfig.preset(name).to_dict()
            settings = _merge(settings, {"model": {"config": dimensions}})
            continue
        path = find_config(name)
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} is no configuration: expected the YAML of a run or of a model")
        if "language" in values and "model" not in values:
            values = {"model": {"config": values}}
        inner = (values.get("model") or {}).get("config")
        if isinstance(inner, str):
            values["model"]["config"] = yaml.safe_load((path.parent / inner).read_text(encoding="utf-8"))
        settings = _merge(settings, values)
    dimensions = (settings.get("model") or {}).get("config")
    if dimensions is None:
        raise ValueError(f"{', '.join(names)}: no model.config in it; put a model's size first, as [base, {names[0]}]")
    return ModelConfig.from_dict(dimensions), settings


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries merge, everything else is replaced, as in `pi05 fit -c … -c …`."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a plain square matrix product here, the median of a few."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def _free_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- tables


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("part")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cost_table(title: str, plan: Plan, counter: Counter, accelerator: Accelerator, utilization: float) -> Table:
    rate = utilization * (accelerator.bf16 if plan.dtype == torch.bfloat16 else accelerator.fp32)
    parameters = {part: sum(p.numel() for p in found) for part, found in parameters_of(plan.model("meta")).items()}
    table = _table(title, ("parameters (M)", "GFLOP", "GB moved", "estimate (ms)"))
    rows = []
    for part in PARTS:
        flops, moved = counter.flops[part], counter.bytes[part]
        rows.append(
            (parameters[part] / 1e6, flops / 1e9, moved / 1e9, 1e3 * max(flops / rate, moved / accelerator.bandwidth))
        )
        table.add_row(part, *map(_number, rows[-1]))
    table.add_row("all", *(_number(sum(column)) for column in zip(*rows, strict=True)))
    return table


def _memory_table(memory: Mapping[str, float]) -> Table:
    table = _table("memory of a training step", ["GiB"])
    for name, size in (*memory.items(), ("all", sum(memory.values()))):
        table.add_row(name, _number(size / GIB))
    return table


def _time_table(title: str, seconds: Mapping[str, float], counter: Counter, rate: float) -> Table:
    table = _table(f"{title} on this machine", ("ms", "GFLOP/s", "of the rate"))
    rows = [(part, seconds[part], counter.flops[part]) for part in PARTS]
    for part, took, flops in (*rows, ("all", sum(seconds.values()), sum(counter.flops.values()))):
        reached = flops / took if took else 0.0
        table.add_row(part, _number(1e3 * took), _number(reached / 1e9), f"{reached / rate:.0%}")
    return table
