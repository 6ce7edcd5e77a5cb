"""`pi05 profile`: what a configuration costs, before a GPU is rented: parameters, FLOPs, bytes, memory, time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from pi05_lightning.cli.configuration import is_model, read_configuration
from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.evaluation.report.tables import table_of
from pi05_lightning.files.ranges import check_range
from pi05_lightning.files.shipped import find_config, find_model
from pi05_lightning.files.yaml_files import is_yaml
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.profiling.accelerators import ACCELERATORS, Accelerator
from pi05_lightning.profiling.cost import COMPONENTS, CostCounter, parameters_of
from pi05_lightning.profiling.free import free_memory
from pi05_lightning.profiling.rate import peak_rate
from pi05_lightning.profiling.step import StepShape
from pi05_lightning.profiling.strategies import Strategy, count, strategies
from pi05_lightning.profiling.workload import Workload
from pi05_lightning.training.run_directory import configuration_in
from pi05_lightning.weights.locate import locate, run_of

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RUN_KEYS: dict[str, Any] = {
    "model.config": ModelConfig | None,
    "model.flow_draws": int,
    "model.knowledge_insulation": bool,
    "model.activation_checkpointing": bool,
    "data.batch_size": int,
    "trainer.precision": int | str | None,
    "trainer.accelerator": Any,
    "model.lora": Any,
    "model.base": Any,
    "stages.pretrain_steps": int,
    "stages.pretrain.freeze": list[str],
    "stages.posttrain_steps": int,
    "stages.posttrain.freeze": list[str],
    "stages.then": Any,
}
GIB = 2**30
console = Console()


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
    devices: int = 1,
    strategy: Literal["fsdp2", "hsdp", "ddp"] | None = None,
) -> None:
    """What a training step and an action chunk of a configuration cost, by component.

    FLOPs, bytes and memory are counted without memory for the model; seconds are measured on this machine where the
    model fits, with random weights. Options that are left out come from the configuration.

    Args:
        configuration: a model size (`base`), its YAML, the YAML of a run, or a checkpoint or run; several as [a, b],
            later ones win.
        batch_size: samples per step.
        cameras: images per sample.
        prompt_tokens: of each sample.
        target_tokens: text and FAST tokens that each sample predicts; 0 for flow matching alone.
        draws: noise draws per sample.
        num_steps: Euler steps of a chunk, which is counted on one device.
        precision: fp32, or bf16 compute over fp32 weights; where a run's configuration does not say, what `pi05 fit`
            takes, and of a model alone bf16 on several devices.
        activation_checkpointing: keep only each block's input for the backward pass.
        accelerator: whose published rates the estimate takes, and whose memory it has to fit into.
        utilization: share of the peak matrix rate that the estimate assumes, on one device.
        measure: whether to time it on this machine, on one device.
        devices: ranks that share a step, of `batch_size` samples each. More than one: what each of them holds and sends
            is counted instead, by strategy.
        strategy: the one that comes first in that table.

    Raises ValueError for configurations that cannot be read, whose training is not counted, and sizes that make no
    step.
    """
    check_range("utilization", utilization, 0, 1, above=True)
    check_range("devices", devices, 1)
    config, settings = read_run([configuration] if isinstance(configuration, str) else configuration)
    if strategy is not None and devices == 1:
        raise ValueError(f"strategy {strategy} is of several ranks: give --devices too")
    check_counted(settings, by_strategy=devices > 1)
    trained_in = str(first(settings["trainer.precision"], "bf16" if devices > 1 else "fp32"))
    shape = StepShape(
        batch_size=first(batch_size, settings["data.batch_size"], 1),
        cameras=cameras,
        prompt_tokens=prompt_tokens,
        target_tokens=target_tokens,
        draws=first(draws, settings["model.flow_draws"], 1),
    )
    work = Workload(
        config,
        shape,
        num_steps=num_steps,
        insulate=first(settings["model.knowledge_insulation"], False),
        checkpointing=first(activation_checkpointing, settings["model.activation_checkpointing"], False),
        dtype=DTYPES[precision or ("bf16" if "16" in trained_in else "fp32")],
        weights=torch.bfloat16 if precision is None and trained_in == "bf16-true" else torch.float32,
    )
    if devices > 1:
        show_strategies(work, devices, strategy, accelerator)
        return
    show(work, accelerator, utilization, measure)


def check_counted(settings: Namespace, by_strategy: bool) -> None:
    """ValueError where a run trains less than a step that is counted here, and so needs less.

    by_strategy: that table has rows of adapters.
    """
    adapters = [] if by_strategy else [key for key in ("model.lora", "model.base") if settings[key]]
    freezing = [
        f"stages.{stage}.freeze"
        for stage in ("pretrain", "posttrain")
        if settings[f"stages.{stage}.freeze"] and settings[f"stages.{stage}_steps"] != 0
    ]
    if any(stage.get("freeze") and stage.get("steps") != 0 for stage in map(dict, settings["stages.then"] or [])):
        freezing.append("stages.then")
    if found := [*adapters, *freezing]:
        raise ValueError(
            f"{' and '.join(found)}: a step is counted in which everything trains, and the run needs less. `pi05 fit`"
            " says what it needs before it loads anything"
            + ("; `--devices 2` counts adapters of rank 16, by strategy" if adapters and not freezing else "")
        )


def first(*values: Any) -> Any:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def read_run(names: Sequence[str]) -> tuple[ModelConfig, Namespace]:
    """A model's dimensions, and the run's settings around them (`RUN_KEYS`), from files merged in order.

    Each is a shipped model size, the YAML of a model or that of a run, or weights (see `locate`): their dimensions win,
    and where they lie in a run, its configuration comes first.
    Raises ValueError where none names dimensions.
    """
    weights = [name for name in names if not is_yaml(name) and Path(name).exists()]
    files = [str(file) for name in weights if (file := configuration_in(run_of(Path(name))))]
    files += [name if is_yaml(name) else str(find_model(name)) for name in names if name not in weights]
    settings = read_configuration(files, RUN_KEYS)
    if not all(is_model(find_config(file)) for file in files):  # what `pi05 fit` takes where a run does not say
        if settings["trainer.precision"] is None and settings["trainer.accelerator"] != "cpu":
            settings["trainer.precision"] = "bf16-mixed"
        if settings["data.batch_size"] is None:
            settings["data.batch_size"] = signature(Pi05DataModule).parameters["batch_size"].default
    if weights:
        settings["model.config"] = locate(weights[-1]).config()
    if settings["model.config"] is None:
        raise ValueError(f"{', '.join(names)}: no model.config in it; put a model's size first, as [base, {names[0]}]")
    return settings["model.config"], settings


def show(work: Workload, accelerator: str, utilization: float, measure: bool) -> None:
    """Print every table."""
    shape, chosen = work.shape, ACCELERATORS[accelerator]
    precision = {dtype: name for name, dtype in DTYPES.items()}[work.dtype]
    console.print(
        f"batch {shape.batch_size}, {shape.cameras} cameras, {shape.prompt_tokens} prompt and"
        f" {shape.target_tokens} predicted tokens, noise draws: {shape.draws}, horizon {work.config.horizon},"
        f" {precision}{', activation checkpointing' if work.checkpointing else ''}",
        highlight=False,
    )
    titles = {"training step": True, f"one action chunk, {work.num_steps} steps": False}
    counters = {title: work.count(train) for title, train in titles.items()}
    rank = count(work, Strategy(1))
    memory = {"weights": rank.weights, "gradients": rank.gradients, "AdamW": rank.optimizer}
    memory["activations, peak"] = rank.activations
    for title, counter in counters.items():
        console.print(cost_table(title, work, counter, chosen, utilization))
    console.print(memory_table(memory))
    needed, free = sum(memory.values()), free_memory(work.device)
    console.print(
        f"On one {accelerator} ({chosen.source}) the step {'fits' if needed < chosen.memory else 'does not fit'} into"
        f" {chosen.memory / 1e9:.0f} GB. The estimates take the larger of FLOPs at {utilization:.0%} of the peak and"
        " bytes at full bandwidth; bytes are those of unfused operations, so fused kernels need less.",
        highlight=False,
    )
    if not measure:
        return
    if needed > free:
        console.print(f"Not timed here: a step needs {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free.")
        return
    dtypes = {work.dtype, torch.float32}  # of the weights: what autocast leaves alone is computed in it
    rate = peak_rate(dtypes, work.device)
    seconds = {title: work.measure(train) for title, train in titles.items()}
    rate = max(rate, peak_rate(dtypes, work.device))  # other programs may have slowed the first one down
    console.print(f"A plain matrix product reaches {rate / 1e9:,.0f} GFLOP/s on this machine.", highlight=False)
    for title, taken in seconds.items():
        console.print(time_table(title, taken, counters[title], rate))


def show_strategies(work: Workload, devices: int, chosen: str | None, accelerator: str) -> None:
    """Print what each rank holds and sends in a step, and where that fits into an accelerator."""
    ways = strategies(devices)
    if chosen is not None and not any(name.startswith(chosen) for name in ways):
        raise ValueError(f"strategy {chosen} does not divide {devices} devices: known for these are {', '.join(ways)}")
    headings = ["weights", "grads", "AdamW", "EMA", "acts", "all", "sent"]
    names = {dtype: name for name, dtype in DTYPES.items()}
    types = (
        names[work.dtype] if work.dtype == work.weights else f"{names[work.dtype]} over {names[work.weights]} weights"
    )
    table = table_of(f"each of {devices} ranks, GiB, {types}", ["strategy"], headings)
    table.columns[0].no_wrap = True
    capacity = ACCELERATORS[accelerator].memory
    fitting: list[str] = []
    for name in sorted(ways, key=lambda name: not name.startswith(chosen or "")):
        rank = count(work, ways[name])
        held = [rank.weights, rank.gradients, rank.optimizer, rank.average, rank.activations]
        table.add_row(name, *(number(size / GIB) for size in (*held, sum(held), rank.sent)))
        fitting += [name] if sum(held) < capacity else []
    parameters = sum(parameter.numel() for parameter in work.model("meta").parameters())
    table.caption = f"sent in a step; three times the parameters in bf16 are {number(3 * 2 * parameters / GIB)}"
    table.caption_justify = "left"
    console.print(table)
    console.print(
        f"Into the {capacity / 1e9:.0f} GB of an {accelerator} fit: {', '.join(fitting) or 'none of them'}",
        highlight=False,
    )


# --- tables


def component_table(title: str, headings: Iterable[str], rows: Mapping[str, Iterable[str]]) -> Table:
    table = table_of(title, ["component"], headings)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cost_table(title: str, work: Workload, counter: CostCounter, accelerator: Accelerator, utilization: float) -> Table:
    rate = utilization * accelerator.rate(work.dtype)
    rows = {}
    for name, parameters in parameters_of(work.model("meta")).items():
        flops, moved = counter.flops[name], counter.bytes[name]
        milliseconds = 1e3 * max(flops / rate, moved / accelerator.bandwidth)
        rows[name] = (sum(p.numel() for p in parameters) / 1e6, flops / 1e9, moved / 1e9, milliseconds)
    rows["all"] = tuple(sum(column) for column in zip(*rows.values(), strict=True))
    headings = ("parameters (M)", "GFLOP", "GB moved", "estimate (ms)")
    return component_table(title, headings, {name: map(number, values) for name, values in rows.items()})


def memory_table(memory: Mapping[str, int]) -> Table:
    sizes = {**memory, "all": sum(memory.values())}
    rows = {name: [number(size / GIB)] for name, size in sizes.items()}
    return component_table("memory of a training step", ["GiB"], rows)


def time_table(title: str, seconds: Mapping[str, float], counter: CostCounter, rate: float) -> Table:
    measured = {name: (seconds[name], counter.flops[name]) for name in COMPONENTS}
    measured["all"] = (sum(seconds.values()), sum(counter.flops.values()))
    rows = {}
    for name, (took, flops) in measured.items():
        reached = flops / took if took else 0.0
        share = f"{reached / rate:.0%}" if reached <= rate else "–"  # other programs ran, and the rate is too low
        rows[name] = (number(1e3 * took), number(reached / 1e9), share)
    return component_table(f"{title} on this machine", ("ms", "GFLOP/s", "of the rate"), rows)
