"""`--trainer.strategy fsdp2`: the weights, their gradients and the optimizer's state divided between the ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh

from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.parallelize import Sharding
from pi05_lightning.module import Pi05Module
from pi05_lightning.training.checkpoint_io import ShardedCheckpointIO
from pi05_lightning.training.precision import CastByShard

NAME = "fsdp2"
TIMEOUT = timedelta(minutes=30)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PATIENCE = timedelta(days=1)
"""How long ranks wait for what the first one does alone, such as a rollout."""


class FSDP2(ModelParallelStrategy):
    """PyTorch's FSDP2: each rank keeps a slice of every weight, its gradient, its average and its optimizer's state.

    All ranks train on data of their own, as with ddp, and what they train is the same. Checkpoints are directories that
    every rank writes its slices into.

    Args:
        replicas: copies of the model, each divided between as many ranks as the others (HSDP). Slices are gathered
            within a replica, and gradients are averaged over all: with as many replicas as nodes, weights stay within
            their node. 1: one copy, divided between all ranks.
        timeout: how long a rank waits for the others, as hours:minutes:seconds, before it fails because one of them
            hangs.
        reduce_dtype: the type in which gradients are summed between ranks; by default the one that they are computed
            in. What is summed over a rank's own samples and accumulated batches, and what the optimizer gets, is fp32
            over fp32 weights all the same.
        offload: weights, gradients, their average and the optimizer's state stay in the host's memory, where the
            optimizer steps too; a block's weights are copied to the GPU as they are gathered. Untested on a GPU.
    """

    def __init__(
        self,
        replicas: int = 1,
        timeout: timedelta = TIMEOUT,
        reduce_dtype: Literal["bf16", "fp32"] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(timeout=timeout)
        check_range("replicas of the strategy fsdp2", replicas, 1)
        self.replicas, self.reduce_dtype, self.offload = replicas, reduce_dtype, offload
        self._sharding: Sharding | None = None

    def setup_environment(self) -> None:
        """Raises ValueError for a number of ranks that the replicas do not divide, and for fp16."""
        if self.offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed on the host
        self._setup_distributed()
        if self._sharding is None:
            self._sharding = self._divide(self.world_size)
        self._module._device_mesh = self._device_mesh  # what `LightningModule.device_mesh` gives
        self._module.sharding = self._sharding
        self.checkpoint_io = ShardedCheckpointIO(self._module.model)

    def _divide(self, world: int) -> Sharding:
        if world % self.replicas:
            raise ValueError(
                f"replicas of the strategy fsdp2 is {self.replicas}, which does not divide the {world} ranks"
                " (trainer.devices × trainer.num_nodes)"
            )
        axes = {"replicate": self.replicas, "shard": world // self.replicas}
        if self.replicas == 1:
            del axes["replicate"]
        kind = self.root_device.type
        self._device_mesh = init_device_mesh(kind, tuple(axes.values()), mesh_dim_names=tuple(axes))
        hosts = dist.new_group(backend="gloo", timeout=self._timeout)
        waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
        reduce = None if self.reduce_dtype is None else DTYPES[self.reduce_dtype]
        return Sharding(self._device_mesh, self._compute_dtype(), reduce, hosts, waiting, self.offload)

    def _compute_dtype(self) -> torch.dtype | None:
        """What FSDP casts weights to, in the place of autocast."""
        plugin = self.precision_plugin
        if not isinstance(plugin, MixedPrecision):
            return None
        if plugin.precision != "bf16-mixed":
            raise ValueError(f"trainer.precision {plugin.precision} is not trained in with fsdp2: use bf16-mixed")
        self.precision_plugin = CastByShard("bf16-mixed", plugin.device)
        return torch.bfloat16

    @property
    def _module(self) -> Pi05Module:
        if not isinstance(self.lightning_module, Pi05Module):
            raise ValueError(f"fsdp2 divides a Pi05Module, not a {type(self.lightning_module).__name__}")
        return self.lightning_module

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        with torch.device("cpu") if self.offload else self.root_device, self.precision_plugin.tensor_init_context():
            yield

    def model_to_device(self) -> None:
        if self.offload:
            self._module._device = self.root_device  # where batches go to
        else:
            super().model_to_device()

    # --- checkpoints: what Lightning and `Pi05Module` know, with tensors of which each rank has its slice

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the model is sharded by then, and callbacks find what they find on one device

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    # upstream's own reshape what a checkpoint holds; each rank's part of what one device has is enough
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state
    load_model_state_dict = Strategy.load_model_state_dict

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not self.offload:
            return Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)  # upstream's moves it to the GPU

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))


StrategyRegistry.register(NAME, FSDP2, description="FSDP2: weights, gradients and optimizer state divided")
