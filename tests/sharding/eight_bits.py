"""An optimizer's state in torchao's 8 bits, on each rank its slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
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


class Layers(nn.Module):
    """Of four ranks all have 8 bits of the first, none of the second, and all but the last of the third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, rows) for rows in (ROWS, ROWS // 2, ROWS - 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


class Cut(Layers):
    """Whose rows of a quarter of blocks four ranks would divide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(COLUMNS // 4, 2 * ROWS + 8)])


class Run:
    """A model that torchao's AdamW trains."""

    def __init__(self, kind: type[Layers]) -> None:
        torch.manual_seed(0)
        self.model, self.step = kind(), 0
        if dist.is_initialized():
            fully_shard(self.model)
        named = dict(self.model.named_parameters())
        self.optimizer = AdamW8bit([{"params": [*named.values()], "param_names": [*named]}], lr=1e-3)

    def train(self, steps: int) -> None:
        width = self.model.layers[0].in_features
        with torch.compiler.set_stance("force_eager"):
            for _ in range(steps):
                self.step += 1
                x = torch.randn(3, width, generator=torch.Generator().manual_seed(self.step))
                self.model(x).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def checkpoint(self) -> dict[str, Any]:
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {"state_dict": weights, "optimizer_states": [self.optimizer.state_dict()], "pi05": {}}

    def write(self, path: Path) -> None:
        write(self.checkpoint(), path)

    def restore(self, path: Path) -> None:
        found = read(path, self.model)
        weights = {name.removeprefix("model."): tensor for name, tensor in found["state_dict"].items()}
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(found["optimizer_states"][0])

    def state(self) -> dict[str, list[Tensor]]:
        """What this rank has of each tensor of the optimizer's, in its parts."""
        names = [name for name, _ in self.model.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        return {f"{names[n]} {key}": parts(state[n][key]) for n in state for key in ("exp_avg", "exp_avg_sq")}


def parts(tensor: Tensor) -> list[Tensor]:
    local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return [local.codes, local.scale] if isinstance(local, OptimState8bit) else [local]


def values(tensor: Tensor) -> Tensor:
    local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.dequantize() if isinstance(local, OptimState8bit) else local


def go_on(path: Path) -> None:
    """A run that is written and restored goes on, on as many ranks, as if it had not been."""
    run, again = Run(Layers), Run(Layers)
    run.train(2)
    run.write(path)
    again.restore(path)
    again.step = run.step
    for one in (run, again):
        one.train(2)
    found, expected = again.state(), run.state()
    for name, tensors in expected.items():
        assert len(found[name]) == len(tensors), name
        assert all(torch.equal(*pair) for pair in zip(found[name], tensors, strict=True)), name


def pass_on(path: Path, other: Path) -> None:
    """Write what was read."""
    run = Run(Layers)
    run.restore(path)
    run.write(other)


def write_and_refuse(path: Path, *, reads: bool) -> None:
    run = Run(Cut)
    if not reads:
        run.train(1)
        return run.write(path)
    with pytest.raises(ValueError, match=r"layers\.0\.weight/exp_avg.* in blocks of 256 values"):
        run.restore(path)


def exp_avg(checkpoint: dict[str, Any]) -> Tensor:
    return checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]


def check_same(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, OptimState8bit)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert found.signed == expected.signed
