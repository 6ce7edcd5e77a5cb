"""Training steps for `benchmarks.gpu`: in every precision, with adapters, quantised, compiled, sharded."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.gpu_figures import GIB, Figure, Place
from benchmarks.harness import flops_of, write_json
from pi05_lightning.files.local import first_line
from pi05_lightning.losses import mean_terms, total_loss
from pi05_lightning.models.parallelize import Lora, Sharding, begin_sharded, checkpoint_blocks, compile_blocks, shard
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind
from pi05_lightning.module import Pi05Module, default_optimizer
from pi05_lightning.optim import MakeOptimizer, param_groups
from pi05_lightning.profiling.rate import wait_for
from pi05_lightning.profiling.step import StepShape
from pi05_lightning.recipe import Recipe


@dataclass(frozen=True)
class Training:
    """A training step: of which stage, in which precision, on how many samples."""

    batch: int
    precision: str = "bf16-true"
    checkpointing: bool = False
    compile: bool = False
    lora: bool = False
    base: Kind | None = None
    """What the layers beside adapters are kept as."""
    eight_bits: bool = False
    """AdamW's state, by torchao."""
    pretrain: bool = False
    goal: str = ""

    @property
    def shape(self) -> StepShape:
        """Stage 1 predicts tokens, stage 2 actions."""
        return StepShape(self.batch, target_tokens=50 if self.pretrain else 0)

    @property
    def name(self) -> str:
        parts = ["pretrain" if self.pretrain else "posttrain", self.precision]
        parts += [word for word in ("lora", "checkpointing", "compile") if getattr(self, word)]
        parts += [f"{self.base} base"] * (self.base is not None) + ["8-bit AdamW"] * self.eight_bits
        return f"training step, {', '.join(parts)}, batch {self.batch}"

    @property
    def optimizer(self) -> MakeOptimizer:
        if not self.eight_bits:
            return default_optimizer
        from torchao.optim import AdamW8bit  # takes seconds to import

        return partial(AdamW8bit, lr=2e-4, weight_decay=0.01)


def training(case: Training) -> Callable[[Place], list[Figure]]:
    """Forward, backward, clipping and the optimizer's step, on `case.batch` samples or as many as there is room for."""

    def measure(place: Place) -> list[Figure]:
        for batch in (case.batch, case.batch * 3 // 4, case.batch // 2, case.batch // 4):
            try:
                return measured(replace(case, batch=batch), place)
            except torch.OutOfMemoryError as error:
                print(f"    batch {batch}: {first_line(error)}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        raise AssertionError(f"not even a quarter of {case.batch} samples fit")

    return measure


def sharded(case: Training) -> Callable[[Place], list[Figure]]:
    """The same with a model that FSDP2 divides between all GPUs of the machine, each of which has `case.batch` samples.

    Without a GPU between two processes.
    """

    def measure(place: Place) -> list[Figure]:
        ranks = torch.cuda.device_count() or 2
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(on_rank, (ranks, folder, case, place), nprocs=ranks)
            return [Figure(**values) for values in json.loads(Path(folder, "figures.json").read_text(encoding="utf-8"))]

    return measure


def on_rank(rank: int, ranks: int, folder: str, case: Training, place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    compute = torch.bfloat16 if case.precision == "bf16-mixed" else None
    figures = measured(case, place, Sharding(init_device_mesh(place.device.type, (ranks,)), compute))
    if rank == 0:
        write_json(figures, Path(folder, "figures.json"))
    dist.destroy_process_group()


def measured(case: Training, place: Place, sharding: Sharding | None = None) -> list[Figure]:
    """Samples per second, and the share of the peak of what a step needs, which is less than what is computed again.

    Without shares on a device whose peak is not known.
    """
    device, mixed = place.device, case.precision == "bf16-mixed"
    module = Pi05Module(
        place.config,
        case.optimizer,
        lora=Lora() if case.lora else None,
        base=case.base,
        activation_checkpointing=case.checkpointing,
        compile=case.compile,
    )
    module.follow(Recipe.of(pretrain_steps=int(case.pretrain), posttrain_steps=int(not case.pretrain)))
    stage = module.recipe.reached[0]
    weights = {"fast": 1.0} if case.pretrain else {"flow": stage.flow_alpha}
    torch.set_default_dtype(torch.float32 if mixed else torch.bfloat16)
    with torch.device(device):
        if sharding is None:
            module.configure_model()
        else:
            configure_shards(module, sharding)
    torch.set_default_dtype(torch.float32)
    model = module.model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not stage.freezes(name)
    groups = param_groups(((n, p) for n, p in model.named_parameters() if p.requires_grad), module.recipe)
    optimizer = module.make_optimizer(groups)
    batch = case.shape.batch(place.config, device)
    casts = mixed and sharding is None  # FSDP does it otherwise

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if casts else nullcontext():
            loss = loss_of(model, batch, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    wait_for(device)
    first = time.perf_counter() - start
    seconds = place.seconds(step, repeats=6)
    ranks = sharding.mesh.size() if sharding else 1
    name = f"{case.name} on each of {ranks} ranks, sharded" if sharding else case.name
    figures = [Figure(name, ranks * case.batch / seconds, "samples/s"), Figure(f"{name}: first step", first, "s")]
    if place.peak is not None:
        needed, computed = (
            case.batch * flops_of_sample(module, case, weights, again) / seconds / place.peak for again in (False, True)
        )
        figures.append(Figure(f"{name}: share of the bf16 peak", needed, "", case.goal))
        if case.checkpointing:
            figures.append(Figure(f"{name}: share of the bf16 peak with what is computed again", computed, ""))
    if device.type == "cuda":
        figures.append(Figure(f"{name}: peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB"))
    return figures


def configure_shards(module: Pi05Module, sharding: Sharding) -> None:
    """As `Pi05Module.configure_model` does under the strategy fsdp2, without a trainer."""
    model = module.model.to(torch.get_default_dtype())
    shard(model, sharding)
    model.to_empty(device=torch.get_default_device())
    torch.manual_seed(0)  # every rank draws the same, and keeps its slices
    model.reset_parameters()
    begin_sharded(model)
    if module.blueprint.compile:
        compile_blocks(model)
    if module.blueprint.activation_checkpointing:
        checkpoint_blocks(model)


def loss_of(model: Pi05, batch: Any, weights: dict[str, float]) -> Tensor:
    terms = model(batch, weights)
    means, _ = mean_terms(terms, {name: term.mask.sum() for name, term in terms.items()})
    return total_loss(means, weights)


def flops_of_sample(module: Pi05Module, case: Training, weights: dict[str, float], checkpointing: bool) -> int:
    """FLOPs of a step, as PyTorch counts them, of each of its samples."""
    counted = Pi05Module(module.config, lora=module.blueprint.lora, activation_checkpointing=checkpointing)
    model = counted.blueprint.blank(module.recipe.reached[0])
    batch = replace(case.shape, batch_size=1).batch(module.config, "meta")
    return flops_of(lambda: loss_of(model, batch, weights).backward())
