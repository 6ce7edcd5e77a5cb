"""Checkpoints of sharded runs: a directory that every rank writes its shards into, and that any number of ranks reads.

NAME.ckpt/.metadata, *.distcp    tensors, as torch.distributed.checkpoint writes them
NAME.ckpt/meta.pt                everything else, and the names of the tensors: plain types, and small tensors
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from pi05_lightning.files.local import first_line
from pi05_lightning.models.shards import own_part, rows_of
from pi05_lightning.ranks import of_all_ranks, together
from pi05_lightning.weights.readable import gone
from pi05_lightning.weights.shards import Layout, MappedReader, ShardReader, read_layout

META = "meta.pt"
STATE_DICT, STATES = "state_dict", "optimizer_states"
"""Where a checkpoint of Lightning's holds what is sharded."""
AVERAGE = "ema"
"""Where one of ours holds the weights' average: {name of the parameter: f32 tensor}."""
AVERAGED = "averaged"
"""In what `read_into` gives: whether its weights are the averages."""
KINDS = "kinds"
"""Where one of ours holds what tensors in torchao's 8 bits are, see `kind_of`: {key: one of each rank's shards}."""
PREFIX = "model."
"""Of the model's tensors among the weights, which are the module's."""


def is_sharded(path: Path) -> bool:
    """Whether a path is a checkpoint of several ranks' shards."""
    return (path / META).is_file()


# --- a checkpoint in two parts


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's sharded tensors, each under a key of its own, and all the rest with their names in order.

    The state of an optimizer goes by the names of parameters.  ValueError where it does not say them.
    """
    tensors: dict[str, Tensor] = {}
    rest = dict(checkpoint)
    for part in (STATE_DICT, AVERAGE):
        if part in checkpoint:
            tensors |= {f"{part}/{name}": tensor.detach() for name, tensor in checkpoint[part].items()}
            rest[part] = list(checkpoint[part])
    if STATES in checkpoint:
        (optimizer,) = checkpoint[STATES]
        names, state = names_of(optimizer["param_groups"]), {}
        for number, values in optimizer["state"].items():
            sharded = {key: value for key, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"{STATES}/{names[number]}/{key}": value.detach() for key, value in sharded.items()}
            state[number] = {key: kind_of(value) if key in sharded else value for key, value in values.items()}
        rest[STATES] = [optimizer | {"state": state}]
    return tensors, rest


def join(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `split` took apart."""
    checkpoint = dict(rest)
    for part in (STATE_DICT, AVERAGE):
        if part in rest:
            checkpoint[part] = {name: tensors[f"{part}/{name}"] for name in rest[part]}
    if STATES in rest:
        (optimizer,) = rest[STATES]
        names = names_of(optimizer["param_groups"])
        state = {
            number: {key: tensors.get(f"{STATES}/{names[number]}/{key}", value) for key, value in values.items()}
            for number, values in optimizer["state"].items()
        }
        checkpoint[STATES] = [optimizer | {"state": state}]
    return checkpoint


def kind_of(tensor: Tensor) -> dict[str, Any] | None:
    """What makes memory for a tensor: nothing for a plain one, options for one in torchao's 8 bits."""
    local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not type(local).__module__.startswith("torchao."):
        return None
    return {"signed": local.signed, "block_size": local.block_size}


def names_of(groups: list[dict[str, Any]]) -> dict[int, str]:
    """The name of each parameter of an optimizer by its number there."""
    if not all("param_names" in group for group in groups):
        raise ValueError(
            "the checkpoint is older than the names by which its optimizer's state could be told apart: resume it on"
            " one device, and go on sharded from what is saved there"
        )
    return {n: name for group in groups for n, name in zip(group["params"], group["param_names"], strict=True)}


def parameter_of(key: str) -> str:
    """The parameter that a sharded tensor is, or belongs to."""
    return key.split("/")[1].removeprefix(PREFIX)


# --- reading


def check_whole(folder: Path) -> None:
    """ValueError for a directory that lacks a file, a part of one, or a tensor; the tensors are not read."""
    found, rest = read_layout(folder), read_rest(folder)
    expected = [f"{part}/{name}" for part in (STATE_DICT, AVERAGE) for name in rest.get(part, [])]
    missing = [key for key in expected if key not in found]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: use another checkpoint")


def read_rest(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside its tensors, and their names in their place. ValueError if damaged."""
    return load(folder / META)


def unpickle(file: Path, *, mapped: bool = True) -> Any:
    """What `torch.save` wrote, tensors mapped from the file or not; executes nothing that it may contain.

    torchao's types, of an optimizer's state in 8 bits or less, are allowed by importing them.  ValueError where the
    file is gone.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError) as error:
        if file.exists():
            raise
        raise ValueError(gone(file)) from error
    except pickle.UnpicklingError:
        if not any(name.startswith("torchao.optim.") for name in get_unsafe_globals_in_checkpoint(file)):
            raise
        import torchao.optim  # noqa: F401

        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def load(file: Path) -> dict[str, Any]:
    """A checkpoint of ours, as `unpickle`, tensors mapped from the file.

    ValueError for a file that is gone, truncated, holds more than tensors and plain types, or is something else's.
    """
    try:
        content = unpickle(file)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is truncated, or no checkpoint of tensors and plain types, and nothing else is read"
            f" ({first_line(error)})"
        ) from error
    if not isinstance(content, dict) or "pi05" not in content:
        raise ValueError(f"{file} is a checkpoint of something else: it has no `pi05` entry")
    return content


def read(path: Path, model: nn.Module | None = None) -> dict[str, Any]:
    """A checkpoint, sharded or a single file's, as `write` takes it; collective.

    model: whose tensors decide where those of the checkpoint are placed: each as that of its name, an average or an
    optimizer's state as its parameter. A rank reads the slices that it has of them, whatever the number of ranks that
    wrote. What is not the model's, or has another shape there, is on the meta device. None: all is read as a whole.
    ValueError on all ranks where one of them fails.
    """
    with together():
        rest, reader, layout = _open(path)
        placed = None if model is None else dict(model.state_dict())
        targets = {key: _room(key, shape, dtype, placed) for key, (shape, dtype) in layout.items()}
        kinds = {key: [kind] for key, kind in kinds_of(rest).items()} | rest.pop(KINDS, {})
        targets |= {key: in_8_bits(key, targets[key], reader, found) for key, found in kinds.items() if key in targets}
        reader.fill({key: target for key, target in targets.items() if not target.is_meta})
        return join(targets, rest)


def read_into(model: nn.Module, path: Path, *, averaged: bool) -> dict[str, Any]:
    """What `read` gives for a use other than training, its weights being the model's own, into which they are read.

    averaged: they are the averages, where it has any. Those apart, and the optimizer's state, are left out.
    """
    with together():
        rest, reader, layout = _open(path, states=False)
        keys, tensors = keys_of(rest, averaged), dict(model.state_dict())
        for name, (shape, dtype) in ((name, layout[key]) for name, key in keys.items()):
            if name not in tensors or tensors[name].shape != shape:
                tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        reader.fill({key: tensors[name] for name, key in keys.items() if not tensors[name].is_meta})
        kept = {part: value for part, value in rest.items() if part not in (STATES, KINDS, AVERAGE)}
        of_model = {PREFIX + name: tensors[name] for name in keys}
        return kept | {STATE_DICT: of_model, AVERAGED: averaged and bool(rest.get(AVERAGE))}


def _open(path: Path, *, states: bool = True) -> tuple[dict[str, Any], ShardReader | MappedReader, Layout]:
    """What a checkpoint, sharded or a single file's, holds beside its tensors; what reads them, and what they are.

    states: the optimizer's too, which older files do not name the parameters of.
    """
    if is_sharded(path):
        return read_rest(path), ShardReader(path), read_layout(path)
    content = load(path)
    tensors, rest = split(content if states else {part: value for part, value in content.items() if part != STATES})
    return rest, MappedReader(tensors), {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def kinds_of(rest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the tensors of an optimizer's state that are no plain ones: what makes memory for them, see `kind_of`."""
    kinds: dict[str, dict[str, Any]] = {}
    for optimizer in rest.get(STATES, ()):
        names = names_of(optimizer["param_groups"])
        for number, values in optimizer["state"].items():
            kinds |= {f"{STATES}/{names[number]}/{k}": kind for k, kind in values.items() if isinstance(kind, dict)}
    return kinds


def kinds_of_ranks(rest: Mapping[str, Any]) -> dict[str, list[dict[str, Any] | None]]:
    """`kinds_of` of every rank's shards, which differ where rows are divided unevenly; collective."""
    found = of_all_ranks(kinds_of(rest))
    return {key: [kinds.get(key) for kinds in found] for key in dict.fromkeys(key for kinds in found for key in kinds)}


def in_8_bits(
    key: str, tensor: Tensor, reader: ShardReader | MappedReader, kinds: list[dict[str, Any] | None]
) -> Tensor:
    """Memory for a tensor's values in torchao's 8 bits, if all that a rank reads of it is so.

    kinds: of the shards that are read, in their order; one may stand for all.  ValueError where a block of values that
    share their scale would be divided.
    """
    from torchao.optim.subclass_8bit import OptimState8bit  # takes seconds to import

    local = own_part(tensor)
    own, shards = rows_of(tensor), reader.rows(key)
    pairs = zip(shards, kinds if len(kinds) > 1 else kinds * len(shards), strict=False)
    found = [(shard, kind) for shard, kind in pairs if shard.start < own.stop and own.start < shard.stop]
    width = local[:1].numel()
    for shard, kind in found:
        cuts = (max(own.start, shard.start) - shard.start, min(own.stop, shard.stop) - shard.start)
        if kind is not None and any(cut * width % kind["block_size"] for cut in cuts):
            raise ValueError(
                f"{key} is saved in blocks of {kind['block_size']} values that share their scale, which today's ranks"
                " would divide: go on with as many ranks as before, or with one"
            )
    if local.is_meta or not found or not all(kind for _, kind in found):
        return tensor
    kind = found[0][1] or {}
    made = OptimState8bit.zeros(local.shape, **kind, device=local.device, dtype=local.dtype)
    if not isinstance(tensor, DTensor):
        return made
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(made, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def keys_of(rest: Mapping[str, Any], averaged: bool) -> dict[str, str]:
    """The key of each weight by its name in the model; with `averaged` that of its average, if it has one."""
    average = rest.get(AVERAGE, ()) if averaged else ()
    names = [name.removeprefix(PREFIX) for name in rest[STATE_DICT]]
    return {name: f"{AVERAGE}/{name}" if name in average else f"{STATE_DICT}/{PREFIX}{name}" for name in names}


def _room(key: str, shape: torch.Size, dtype: torch.dtype, placed: Mapping[str, Tensor] | None) -> Tensor:
    """Memory on the host for a tensor of a checkpoint, or a shard of it, as the model's tensor is placed."""
    if placed is None:
        return torch.empty(shape, dtype=dtype)
    like, is_state = placed.get(parameter_of(key)), key.startswith(f"{STATES}/")
    if like is None or (like.shape != shape and not is_state):
        return torch.empty(shape, dtype=dtype, device="meta")
    if like.shape != shape:
        return torch.empty(shape, dtype=dtype)
    return torch.empty_like(like, dtype=dtype, device="cpu", requires_grad=False)
