"""What each rank holds and sends in a training step, by strategy: counted on fake tensors and fake ranks.

The sharded model is the one that is trained, `fully_shard`ed, over PyTorch's fake process group, whose collectives do
nothing. What is sent is counted from the operations themselves, as rings send it: of a gathered or scattered tensor
(n − 1) / n, of one that is summed everywhere twice that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from pi05_lightning.models.parallelize import Lora, Sharding, begin_sharded, checkpoint_blocks, shard, with_adapters
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.shards import own_part
from pi05_lightning.profiling.memory import Held, bytes_of, make_fake, parts_of, step_memory
from pi05_lightning.profiling.workload import Workload


@dataclass(frozen=True)
class Strategy:
    """How ranks share a training step.

    shards: each copy of the model is divided between so many ranks; 1: it is whole, as with ddp.  lora, base: adapters
    of rank 16, beside layers of 4 or 8 bits.
    """

    ranks: int
    shards: int = 1
    lora: bool = False
    base: Any = None


@dataclass(frozen=True)
class Rank:
    """Bytes of one rank, with AdamW and an average of the weights. sent: in a step."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    sent: int
    group: int = 0
    """The largest group of parameters that is whole at one time, as they are kept."""

    @property
    def kept(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


def count(work: Workload, strategy: Strategy) -> Rank:
    """What a rank holds and sends in a training step under a strategy."""
    return _sharded(work, strategy) if strategy.shards > 1 else _whole(work, strategy)


def _model(work: Workload, strategy: Strategy, fake: FakeTensorMode) -> Pi05:
    if strategy.lora:
        lora = Lora()
        model = with_adapters(work.config, lora, strategy.base)
        for name, parameter in model.named_parameters():
            trains = any(part in name for part in (".lora_", *lora.train))
            parameter.requires_grad = parameter.is_floating_point() and trains
    else:
        model = Pi05.without_memory(work.config)
    if work.checkpointing:
        checkpoint_blocks(model)
    make_fake(model, fake, work.weights)
    return model


def _whole(work: Workload, strategy: Strategy) -> Rank:
    fake = FakeTensorMode()
    model = _model(work, strategy, fake)

    def forward() -> Tensor:
        with torch.autocast("cpu", work.dtype, enabled=work.dtype != work.weights):
            return work.loss(model)

    step = step_memory(model, forward, fake)
    gradients = sum(step.gradients.values())
    trained = [value for name, value in model.named_parameters() if name in step.gradients]
    buckets = gradients if strategy.ranks > 1 else 0  # DDP's
    return Rank(
        weights=bytes_of([*model.parameters()]),
        gradients=gradients + buckets,
        optimizer=2 * bytes_of(trained),
        average=4 * sum(value.numel() for value in trained),
        activations=step.activations,
        sent=2 * gradients * (strategy.ranks - 1) // strategy.ranks,
    )


def _sharded(work: Workload, strategy: Strategy) -> Rank:
    fake = FakeTensorMode()
    model = _model(work, strategy, fake)
    axes = {"replicate": strategy.ranks // strategy.shards, "shard": strategy.shards}
    if axes["replicate"] == 1:
        del axes["replicate"]
    compute = None if work.dtype == work.weights else work.dtype
    with fake_ranks(strategy.ranks):
        sharding = Sharding(init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes)), compute)
        with fake, Sent(strategy) as held:
            shard(model, sharding)
            begin_sharded(model)
            own = [own_part(parameter) for parameter in model.parameters()]
            held.begin(own)
            work.loss(model).backward()
    gradients = [own_part(p.grad) for p in model.parameters() if p.grad is not None]
    weights = bytes_of(own)
    return Rank(
        weights=weights,
        gradients=bytes_of(gradients),
        optimizer=2 * weights,
        average=4 * sum(x.numel() for x in own),
        activations=held.peak - weights - bytes_of(gradients),
        sent=held.sent,
        group=held.largest,
    )


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Within it this process is the first of so many, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Sent(Held):
    """Counts also what a rank sends, and the largest tensor that is gathered."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.strategy, self.sent, self.largest = strategy, 0, 0

    def begin(self, held: list[Tensor]) -> None:
        """Count from here, with what is held."""
        self.now = self.peak = self.sent = self.largest = 0
        self._storages = {}
        self.saw(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, shards = func.__name__.partition(".")[0], self.strategy.shards
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole = max(tensor.nbytes for tensor in parts_of(args))
            self.sent += whole * (shards - 1) // shards
            if name == "_allgather_base_":
                self.largest = max(self.largest, whole)
        elif name == "allreduce_":
            copies = self.strategy.ranks // shards
            self.sent += 2 * bytes_of(args) * (copies - 1) // copies
        elif func.namespace == "c10d":
            raise NotImplementedError(f"bytes of the collective {name} are not counted")
        return super().__torch_dispatch__(func, types, args, kwargs)


def strategies(devices: int) -> dict[str, Strategy]:
    """Ways to train on so many ranks, two or more, by what they are called."""
    found = {"fsdp2": Strategy(devices, devices)}
    replicas = devices // 8 if devices > 8 and devices % 8 == 0 else 2
    if devices % replicas == 0 and devices > replicas:
        found[f"hsdp {replicas} × {devices // replicas}"] = Strategy(devices, devices // replicas)
    return found | {
        "ddp": Strategy(devices),
        "LoRA, ddp": Strategy(devices, lora=True),
        "LoRA on nf4, ddp": Strategy(devices, lora=True, base="nf4"),
    }
