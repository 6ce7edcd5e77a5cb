"""What is done to a finished model from outside, in this order: quantised base, adapters, shards, compiling, rerunning.

Adapters are LoRA's (arXiv 2106.09685), through PEFT: small trained matrices beside frozen linear layers. Sharding is
PyTorch's FSDP2: each rank keeps a slice of every parameter, and has a group of them whole while it computes with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from pi05_lightning.files.ranges import check_expressions, check_range
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.gemma import AdaRMSNorm, Block, ExpertBlock
from pi05_lightning.models.heads.base import HeadFactory
from pi05_lightning.models.kernels import Linear
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import CLASSES, Kind
from pi05_lightning.models.shards import unsharded
from pi05_lightning.models.siglip import SiglipBlock


@dataclass(frozen=True)
class Lora:
    """Which linear layers of backbone and action expert get adapters, and what is trained whole beside them."""

    rank: int = 16
    alpha: int = 16
    """What an adapter computes is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str = ""
    """Regular expression over the names of linear layers; empty: all of them."""
    train: tuple[str, ...] = ("time_mlp", "action_in_proj", "action_out_proj", "projector", "auxiliary")
    """Regular expressions: parameters that are trained whole. All others but the adapters are frozen."""

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, 1)
        check_range("lora.alpha", self.alpha, 0, above=True)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}: it must be in [0, 1)")
        check_expressions("lora", (self.targets, *self.train))

    def check_patterns(self, names: Collection[str]) -> None:
        """Raises ValueError for a pattern of `train`, other than those by default, that none of the names matches."""
        for pattern in self.train:
            if pattern not in Lora.train and not any(re.search(pattern, name) for name in names):
                raise ValueError(f"lora.train {pattern!r} matches no parameter of the model")

    @property
    def frozen(self) -> str:
        """A regular expression of the parameters that stay as they are; what `Stage.freeze` wants."""
        return f"^(?!.*({'|'.join((r'\.lora_', *self.train))}))"


def add_adapters(model: Pi05, lora: Lora) -> None:
    """Put adapters beside the model's linear layers, in place; they start as zero, so nothing changes yet.

    ValueError when `targets` matches no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapted_layers(model, lora),
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=model.device.type == "meta")


def adapted_layers(model: Pi05, lora: Lora) -> list[str]:
    """The names of the linear layers that get adapters; ValueError where `targets` matches none."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and re.search(lora.targets, name)
        and not any(re.search(pattern, name) for pattern in lora.train)
    ]
    if not layers:
        raise ValueError(f"lora.targets {lora.targets!r} matches no linear layer that lora.train leaves")
    return layers


def with_adapters(
    config: ModelConfig, lora: Lora, base: Kind | None = None, heads: Mapping[str, HeadFactory] | None = None
) -> Pi05:
    """A model without memory, with adapters, whose base is quantised or not."""
    model = Pi05.without_memory(config, heads)
    if base is not None:
        quantize_base(model, base, lora)
    add_adapters(model, lora)
    return model


def reset_adapters(model: Pi05) -> None:
    """Random initialisation of adapters that were put into a model without memory: what PEFT gives those of others.

    Only needed where the model is sharded before its parameters have values.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                pair = cast("tuple[nn.Linear, nn.Linear]", (layer.lora_A[name], layer.lora_B[name]))
                for part in pair:
                    # PEFT makes the layers before it fills them, which takes random numbers too
                    nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
                with unsharded(pair[0]), unsharded(pair[1]):
                    layer.reset_lora_parameters(name, init_lora_weights=True)


def quantize_base(model: Pi05, kind: Kind, lora: Lora) -> None:
    """Have the linear layers that adapters leave frozen keep their weights in 4 or 8 bits; before `add_adapters`.

    On the meta device: whatever gives the model values next, has each weight quantised as soon as it is there. The
    embedding stays as it is, and so do layers whose size does not divide into blocks.
    """
    adapted = set(adapted_layers(model, lora))
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear):
            continue
        place = f"{name}.base_layer" if name in adapted else name
        own = ["weight"] if layer.bias is None else ["weight", "bias"]  # no gradient reaches either
        if all(re.search(lora.frozen, f"{place}.{part}") for part in own) and CLASSES[kind].takes(layer.weight):
            model.set_submodule(name, CLASSES[kind](layer))


@dataclass(frozen=True)
class Sharding:
    """How a run divides a model between its ranks.

    mesh: of one axis, all ranks, between which every parameter is divided; or of two, replicas and the ranks of each.
    compute: what parameters are cast to while a group is whole (None: left as they are).  reduce: what gradients are
    cast to while ranks sum them (None: left as they are computed).  hosts: a process group of the ranks' processors,
    through which they agree without waiting for a GPU.  waiting: the same, with more patience.
    offload: slices, their gradients and the optimizer's state stay in the host's memory.
    """

    mesh: DeviceMesh
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    hosts: dist.ProcessGroup | None = None
    waiting: dist.ProcessGroup | None = None
    offload: bool = False

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags any rank has; every rank must ask."""
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.hosts)
        return [bool(flag) for flag in found.tolist()]

    def wait(self) -> None:
        """Wait for every rank, however long one of them has something to do alone."""
        dist.barrier(self.waiting)


def shard(model: Pi05, sharding: Sharding) -> None:
    """Divide every parameter of a model, on the meta device or not, between the ranks of a mesh, in place.

    Whole at one time are: a block of SigLIP's, Gemma's or the action expert's; what makes the expert's norms of the
    flow time, for all blocks; and from the first use to the end of the step the rest, the embedding and the heads
    foremost. Groups are gathered as they are called, so that every rank must call the same ones, see `Pi05.forward`.
    """
    policy = MixedPrecisionPolicy(sharding.compute, sharding.reduce, cast_forward_inputs=False)
    kept = CPUOffloadPolicy(pin_memory=sharding.mesh.device_type != "cpu") if sharding.offload else OffloadPolicy()
    divide = partial(fully_shard, mesh=sharding.mesh, mp_policy=policy, offload_policy=kept)
    # a head of the user's is called on ranks with targets for it, or on no rows: its own parameters are the root's
    modulation = [norm.dense for norm in model.flow_head.modules() if isinstance(norm, AdaRMSNorm)]
    divide(modulation)
    for block in [*blocks_of(model.backbone), *blocks_of(model.flow_head)]:
        divide(block)
        if isinstance(block, Block):
            register_fsdp_forward_method(block, "keys_values")
    divide(model)


def begin_sharded(model: Pi05) -> None:
    """Ready a sharded model whose parameters have memory; before any of them is frozen.

    FSDP notes once, by those that are trained then, what gradients of a group are summed in. No public call does it
    for all groups.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise TypeError(f"{name} is not divided between the ranks, so that its gradients would not be summed")
        parameter.requires_grad = True
    assert isinstance(model, FSDPModule)
    model._get_fsdp_state()._lazy_init()


@torch.no_grad()
def gather(model: Pi05, into: Pi05, sharding: Sharding, keep: bool = True) -> Pi05:
    """A model of whole tensors: `into`, of the same parts without memory; `keep` False, on ranks that need none.

    Every rank must call it. Cast as training computes, and where it does.
    """
    tensors: dict[str, Tensor] = {}
    saved = model.state_dict()
    for name, tensor in (dict(model.named_buffers()) | saved).items():
        dtype = (tensor.is_floating_point() and sharding.compute) or tensor.dtype
        cast = tensor.to(sharding.mesh.device_type, dtype)
        found = cast.full_tensor() if isinstance(cast, DTensor) else cast
        if keep:
            tensors[name] = found
    if keep:
        into.load_state_dict({name: tensors[name] for name in saved}, assign=True)
        for name in tensors.keys() - saved.keys():  # buffers that no checkpoint has
            layer, _, key = name.rpartition(".")
            setattr(into.get_submodule(layer), key, tensors[name])
    return into


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every SigLIP, Gemma and expert block."""
    return (block for block in model.modules() if isinstance(block, SiglipBlock | Block | ExpertBlock))


def compile_blocks(model: Pi05) -> None:
    """Compile every block for training steps; before `checkpoint_blocks`, which runs what it finds once more.

    Blocks of a kind have the same code, so that each kind is compiled once, however deep the model. Between them there
    is little to fuse. Without gradients they run as they are: validation and rollouts have more shapes than the
    compiler keeps graphs for, and once it gives up on a function, training would go on without it.
    """
    for block in blocks_of(model):
        # on the instance, so that names of parameters stay what they are
        block.forward = _compiled_where_it_learns(block.forward)


def _compiled_where_it_learns(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    @wraps(forward)
    def call(*args: Any, **options: Any) -> Any:
        # a function that the compiler first meets within a mode, such as the counter of FLOPs, it passes over for good
        learns = torch.is_grad_enabled() and not is_in_torch_dispatch_mode()
        return (compiled if learns else forward)(*args, **options)

    return call


@contextmanager
def compiled_blocks(model: Pi05) -> Iterator[None]:
    """Within it every block is compiled, without gradients too: for what is recorded once and replayed."""
    own = {block: block.__dict__.get("forward") for block in blocks_of(model)}
    for block in own:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def checkpoint_blocks(model: Pi05) -> None:
    """Keep of every block its input alone; the backward pass runs the block once more."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
