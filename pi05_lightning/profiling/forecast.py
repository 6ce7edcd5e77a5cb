"""What memory a run will need, by category, and what would make it fit: counted on fake tensors, before any is taken.

weights       as they are kept; the frozen ones too
gradients     of what a stage trains; under DDP once more, as the buckets in which they are sent
optimizer     the state of everything that was trained so far
average       fp32, of everything that any stage trains
activations   the most that a step holds beside the others; or what the optimizer's step or validation holds
              meanwhile, where that is more
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from pi05_lightning.losses import weighted_sums
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.optim import MakeOptimizer, param_groups
from pi05_lightning.profiling.memory import bytes_of, make_fake, optimizer_memory, step_memory
from pi05_lightning.recipe import Recipe, Stage
from pi05_lightning.types import Batch

GIB = 2**30
MARGIN = 0.15
"""Of a forecast, by which a real run may need less: only beyond it a run does not fit."""
HEAP, HEAP_SHARE = 0.3 * GIB, 0.03
"""As measured of glibc: what it keeps of gradients and activations at most, and of everything (docs/scale.md)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by category."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    heap: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = [f"{name} {gib(size)}" for name, size in asdict(self).items() if size]
        return f"{gib(self.total)} GiB ({', '.join(parts)})"

    def divided(self, shards: int, copy: int) -> Memory:
        """On each of so many ranks that a sharded model is divided between.

        Gathered groups hold a sixth of it, and validation a whole copy, of so many bytes.
        """
        if shards == 1:
            return self
        parts = {name: getattr(self, name) // shards for name in ("weights", "gradients", "optimizer", "average")}
        return replace(self, **parts, activations=max(self.activations + self.weights // 6, copy))

    def fits(self, free: float) -> bool:
        """Whether it may fit, as far as a forecast can tell."""
        return self.total * (1 - MARGIN) <= free


@dataclass(frozen=True)
class Setting:
    """What a trainer decides of the memory.

    precision: 32-true, bf16-mixed, bf16-true.  accumulates: several batches to a step.  averages: weights are averaged.
    buckets: gradients are copied to be sent, as DDP does.  device: what the step would run on, cpu or cuda.
    shards: ranks that the model is divided between.  validates: it is measured on the way.
    """

    precision: str = "32-true"
    accumulates: bool = False
    averages: bool = False
    buckets: bool = False
    device: str = "cpu"
    shards: int = 1
    validates: bool = True

    @property
    def weights(self) -> torch.dtype:
        return {"bf16-true": torch.bfloat16}.get(self.precision, torch.float32)

    def copied(self, weights: int) -> int:
        """Bytes of a copy of weights in the type that is computed in, which sharded runs validate with."""
        return weights // 2 if "mixed" in self.precision else weights

    def autocast(self) -> Any:
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        return torch.autocast(self.device, kinds[self.precision]) if self.precision in kinds else nullcontext()


Batches = Callable[[Stage], Batch]
"""The largest batch that a stage will have, on the host, with its noise."""


def forecast(
    blank: Callable[[Stage], Pi05],
    recipe: Recipe,
    make: MakeOptimizer,
    batches: Batches,
    setting: Setting,
    insulate: bool = False,
) -> dict[str, Memory]:
    """What each stage of a recipe needs, by its name.

    blank: a model without memory, frozen as in a stage, adapters and checkpointing included.  make: the optimizer, of
    `param_groups`.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    trained: dict[str, nn.Parameter] = {}
    found: dict[str, Memory] = {}
    steps = {}
    for stage in recipe.reached:
        model = blank(stage)
        make_fake(model, fake, setting.weights, setting.device)
        batch = batches(stage)

        def forward(model: Pi05 = model, batch: Batch = batch, stage: Stage = stage) -> Tensor:
            with setting.autocast():
                without_numbers = replace(batch, **tree_map_only(Tensor, fake.from_tensor, vars(batch)))
                terms = model(without_numbers.to(setting.device), stage.weights, insulate=insulate)
                return torch.stack(weighted_sums(terms, stage.weights)).sum()

        steps[stage.name] = step_memory(model, forward, fake, accumulates=setting.accumulates)
        trained |= {name: value for name, value in model.named_parameters() if name in steps[stage.name].gradients}
        weights = bytes_of([*model.parameters(), *model.buffers()])
    optimizer = optimizer_memory(trained, _of_groups(make, recipe), fake)
    of_average = [p for name, p in model.named_parameters() if recipe.trains(name)] if setting.averages else []
    validating = sum(p.nbytes for p in of_average if p.dtype != torch.float32)
    state = 0
    begun: set[str] = set()
    for name, step in steps.items():
        state += sum(optimizer.state[key] for key in step.gradients if key not in begun)
        begun |= set(step.gradients)
        memory = Memory(
            weights=weights,
            gradients=sum(step.gradients.values()) * (2 if setting.buckets else 1),
            optimizer=state,
            average=4 * sum(p.numel() for p in of_average),
            activations=max(step.activations, optimizer.temporary, validating),
        )
        memory = memory.divided(setting.shards, setting.copied(weights) if setting.validates else 0)
        if setting.device == "cpu":
            heap = min(HEAP, memory.gradients + memory.activations) + HEAP_SHARE * memory.total
            memory = replace(memory, heap=int(heap))
        found[name] = memory
    return found


def _of_groups(make: MakeOptimizer, recipe: Recipe) -> Callable[[Mapping[str, nn.Parameter]], Optimizer]:
    def build(named: Mapping[str, nn.Parameter]) -> Optimizer:
        optimizer = make(param_groups(named.items(), recipe))
        for group in optimizer.param_groups:
            # what PyTorch chooses by itself on a GPU
            if group.get("foreach", False) is None and not group.get("fused") and next(iter(named.values())).is_cuda:
                group["foreach"] = True
        return optimizer

    return build


def at_most(model: nn.Module, columns: int, scores: int, logits: int) -> int:
    """More bytes than any step of a small model needs, by its linear layers alone: in a moment, and nothing is run.

    columns: image patches, tokens and action steps of all rows and draws.  scores: weights of attention of one of them,
    in all heads of all layers.  logits: scores of tokens.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    values = sum(layer.in_features + layer.out_features for layer in linear)
    parameters = sum(p.numel() for p in model.parameters())
    return 4 * (6 * parameters + columns * (2 * values + 3 * scores) + 4 * logits)


def largest(stages: Mapping[str, Memory]) -> tuple[str, Memory]:
    """The stage that needs most, and what it needs."""
    return max(stages.items(), key=lambda item: item[1].total)


def gib(size: float) -> str:
    """GiB, with as many digits as say something."""
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def table(memory: Memory, free: int) -> Iterable[str]:
    """A line per category, the sum, and what is free."""
    rows = {name: size for name, size in asdict(memory).items() if size} | {"all": memory.total, "free": free}
    return [f"  {name:<12}{size / GIB:8.2f} GiB" for name, size in rows.items()]
