"""Processes over gloo that shard a small model, without Lightning."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pi05_lightning.training.run_directory import check_shared
from pi05_lightning.weights.sharded_checkpoint import is_sharded, read
from pi05_lightning.weights.sharded_writer import BackgroundWriter, write

PATIENCE = 120  # seconds


def server() -> Any:
    """What all ranks fork from, so that none has to import much."""
    context = multiprocessing.get_context("forkserver")
    # the first comes with the first DTensor; this file is not on the path of the process that they fork from
    context.set_forkserver_preload(["torch._dynamo", "pi05_lightning.weights.sharded_writer"])
    return context


def _begin(rank: int, ranks: int, meeting: str, log: Path, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    work(*args)
    dist.destroy_process_group()


def start(ranks: int, log: Path, work: Callable[..., None], *args: Any) -> list[Any]:
    """The processes of so many ranks that do the work."""
    meeting = log.with_name(f"{log.name}.{len(list(log.parent.iterdir()))}.meeting")
    meeting.unlink(missing_ok=True)
    made = [server().Process(target=_begin, args=(rank, ranks, str(meeting), log, work, args)) for rank in range(ranks)]
    for process in made:
        process.start()
    return made


def end(processes: list[Any], log: Path) -> list[int | None]:
    """Exit codes; when one rank ends badly the others are killed, as a launcher would."""
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], PATIENCE)
        running = [process for process in running if process.sentinel not in ended]
        for process in processes:
            if process not in running:
                process.join()
        if not ended or any(process.exitcode for process in processes if process not in running):
            for process in running:
                process.kill()
        if not ended:
            raise TimeoutError(f"no rank ended within {PATIENCE} s: {log.read_text()}")
    return [process.exitcode for process in processes]


class Small(nn.Module):
    """Rows that no number of ranks divides, a part that is frozen, a buffer, a group per layer and a root."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.frozen = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 1)
        self.register_buffer("mean", torch.arange(4.0))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.frozen(hidden)


class Run:
    """A model with its optimizer and average, sharded over the ranks, or whole in a process without any."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Small()
        self.model.frozen.requires_grad_(False)
        if dist.is_initialized():
            for module in (*self.model.layers, self.model):
                fully_shard(module)
        self.named = dict(self.model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.named.items() if p.requires_grad}
        trained = list(self.named)
        self.optimizer = torch.optim.AdamW([{"params": list(self.named.values()), "param_names": trained}], lr=0.01)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            tokens = torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(self.step))
            self.model(tokens).pow(2).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, average in self.average.items():
                average.lerp_(self.named[name].detach(), 0.1)

    def checkpoint(self) -> dict[str, Any]:
        return {
            "state_dict": {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            "optimizer_states": [self.optimizer.state_dict()],
            "ema": self.average,
            "pi05": {"saved_at": 1.5},
            "callbacks": {"best": {"score": torch.tensor(0.5)}},
            "global_step": self.step,
        }

    def restore(self, path: Path) -> dict[str, Any]:
        checkpoint = read(path, self.model)
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()})
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        self.average, self.step = checkpoint["ema"], checkpoint["global_step"]
        return checkpoint

    def gathered(self) -> dict[str, Any]:
        """The checkpoint, whole on every rank."""
        return whole(self.checkpoint())


def whole(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.full_tensor() if hasattr(value, "full_tensor") else value
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


# --- what a rank does


def train_and_write(steps: int, path: Path, reference: Path) -> None:
    """Write a sharded checkpoint, and beside it what a single process would have written."""
    run = Run()
    run.train(steps)
    gathered = run.gathered()
    if dist.get_rank() == 0:
        torch.save(gathered, reference)
    write(run.checkpoint(), path)


def read_and_write(path: Path, reference: Path, other: Path | None) -> None:
    """Restore a run, which has to be the reference to the bit, and write it again."""
    run = Run(seed=1)
    checkpoint = run.restore(path)
    check_placed(checkpoint, run)
    gathered = run.gathered()
    check_same(gathered, torch.load(reference))
    if other is not None:
        write(run.checkpoint(), other)


def check_placed(checkpoint: dict[str, Any], run: Run) -> None:
    """Each tensor is where the parameter is that it belongs to."""
    (optimizer,) = checkpoint["optimizer_states"]
    found = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    states = [(name, optimizer["state"].get(number, {})) for number, name in enumerate(run.named)]
    pairs = [*found.items(), *checkpoint["ema"].items()]
    pairs += [(name, state[key]) for name, state in states for key in ("exp_avg", "exp_avg_sq") if state]
    assert len(pairs) > 20
    for name, tensor in pairs:
        if name in run.named:
            assert isinstance(tensor, DTensor), name
            assert tensor.placements == run.named[name].placements
            assert tensor.to_local().shape == run.named[name].to_local().shape


def check_same(found: Any, expected: Any, where: str = "") -> None:
    """Everything is equal, to the bit, and in the same order."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            check_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            check_same(found[number], value, f"{where}/{number}")
    else:
        assert found == expected, where


def write_in_background(first: Path, second: Path, reference: Path) -> None:
    """Train on while two checkpoints are written, and do after each what is to be done once it has its name."""
    run, writer = Run(), BackgroundWriter()
    seen: list[bool] = []
    for path in (first, second):
        run.train(2)
        gathered = run.gathered()
        if dist.get_rank() == 0:
            torch.save(gathered, reference / f"{path.name}.pt")
        writer.write(run.checkpoint(), path)
        writer.then(partial(lambda path: seen.append(is_sharded(path)), path))
        run.train(3)
    writer.wait()
    assert seen == ([True, True] if dist.get_rank() == 0 else seen)
    assert len(seen) == 2


def fail_to_write(folder: Path) -> None:
    """Where one rank cannot write, all of them say so, and nothing is there."""
    run, writer = Run(), BackgroundWriter()
    run.train(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if dist.get_rank() == 1 else resource.RLIM_INFINITY,) * 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(ValueError, match=r"now.ckpt could not be written .*too large"):
        write(run.checkpoint(), folder / "now.ckpt")
    done: list[bool] = []
    writer.write(run.checkpoint(), folder / "later.ckpt")
    writer.then(lambda: done.append(True))
    with pytest.raises(ValueError, match=r"later.ckpt could not be written .*too large"):
        writer.write(run.checkpoint(), folder / "next.ckpt")
    assert not done
    with pytest.raises(ValueError, match="callbacks/mine"):
        write(run.checkpoint() | {"callbacks": {"mine": Path("a")}}, folder / "unreadable.ckpt")
    assert not list(folder.glob("*.ckpt"))


def look_elsewhere(folder: Path) -> None:
    """Where one rank sees another folder, all of them say so; nothing is left in the folder."""
    check_shared(folder / "shared")
    dist.barrier()  # the first rank takes its file away last
    assert not list((folder / "shared").iterdir())
    own = folder / str(dist.get_rank())
    with pytest.raises(ValueError, match=f"{folder}/1, where the run is saved, is not the same folder on all machines"):
        check_shared(own, patience=1)
    dist.barrier()
    assert not (folder / "1").exists()
    assert not list((folder / "0").iterdir())


def be_killed(folder: Path, rank: int, event: int) -> None:
    """Write one checkpoint, then another one, in which a rank is killed at its n-th touch of a file."""
    run = Run()
    run.train(1)
    write(run.checkpoint(), folder / "step=1.ckpt")
    run.train(1)
    seen = 0

    def count(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(args[:2]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        sys.addaudithook(count)
    write(run.checkpoint(), folder / "step=2.ckpt")
