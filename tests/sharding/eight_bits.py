"""An optimizer's state in torchao's 8 bits, on each rank its slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit

from pi05_lightning.weights.sharded_checkpoint import read
from pi05_lightning.weights.sharded_writer import write

ROWS, COLUMNS = 64, 256


def state() -> Tensor:
    """Random codes and scales."""
    generator = torch.Generator().manual_seed(0)
    made = OptimState8bit.zeros((ROWS, COLUMNS), block_size=COLUMNS)
    made.codes.copy_(torch.randint(255, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8))
    made.scale.copy_(torch.rand(ROWS, generator=generator))
    return made


def own(whole: Tensor) -> Tensor:
    """This rank's rows."""
    rows = ROWS // dist.get_world_size()
    return whole[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def write_and_read(path: Path) -> None:
    model = nn.Linear(COLUMNS, ROWS, bias=False)
    fully_shard(model)
    weight = model.weight
    assert isinstance(weight, DTensor)
    sharded = DTensor.from_local(own(state()), weight.device_mesh, weight.placements, run_check=False)
    optimizer = {"state": {0: {"exp_avg": sharded}}, "param_groups": [{"params": [0], "param_names": ["weight"]}]}
    content = {"state_dict": {"model.weight": weight}, "optimizer_states": [optimizer], "pi05": {}}
    write(content, path)
    found = exp_avg(read(path, model))
    assert isinstance(found, DTensor)
    check_same(found.to_local(), own(state()))


def exp_avg(checkpoint: dict[str, Any]) -> Tensor:
    return checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]


def check_same(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, OptimState8bit)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert found.signed == expected.signed
