"""Tensors on disk and in memory: reading, mapping, saving, and strict loading into a model on the meta device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pi05_lightning.files.local import read_json, replacing
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"
"""Of weights in several files; what large checkpoints are split into."""
TensorShapes = Mapping[str, tuple[int, ...]]
Keep = Callable[[str, Tensor], Mapping[str, Tensor]]
"""What is kept of a tensor, and under which names, as soon as it is read; several threads ask at once."""
READERS = 4
"""Threads that read a file: one alone waits for the disk or copies, where several do both at once."""


def keep_all(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Keep a tensor as it is."""
    return {name: tensor}


class ContentHash:
    """SHA-256 of the names, types, shapes and values of tensors, in whatever order they come."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Take note of a tensor; nothing of it is kept."""
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._digests[name] = f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
        return {}

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._digests.values())).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights: model.safetensors, or those that its index names; none where neither is.

    ValueError where both are, and for an index that names no files beside it.
    """
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensors to files beside it: copy or download it again")
    files = [folder / name for name in sorted(set(shards.values()))]
    if (folder / WEIGHTS).is_file() and folder / WEIGHTS not in files:
        raise ValueError(f"{folder} has weights twice, in {WEIGHTS} and in the files of {INDEX}: remove one of the two")
    return files


def map_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weights, as `map_tensors`; ValueError also for one that is in two of its files."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder) or [folder / WEIGHTS]:
        found = map_tensors(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{file} holds what another file of {folder} holds too: {', '.join(twice)}")
        tensors |= found
    return tensors


def read_weights(
    folder: Path, keys: Collection[str] | None, dtype: torch.dtype | None, keep: Keep
) -> dict[str, Tensor]:
    """The tensors of a folder's weights (all, or those named), as `read_tensors`."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder) or [folder / WEIGHTS]:
        own = None if keys is None else [key for key in map_tensors(file) if key in keys]
        tensors |= read_tensors(file, own, dtype, keep)
    return tensors


def map_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped from it: nothing is read until it is used.

    ValueError if the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder that holds {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): copy or download it again") from error


def read_tensors(
    path: Path, keys: Collection[str] | None = None, dtype: torch.dtype | None = None, keep: Keep = keep_all
) -> dict[str, Tensor]:
    """What is kept of the tensors of a safetensors file (all, or those named), each cast to `dtype` as it is read.

    They are in memory of their own: mapped ones would do, but their addresses depend on the file's header, and with
    them the last bit of every result; and they read from a file that may be gone.  ValueError as `map_tensors`.
    """
    shapes = map_tensors(path)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))

    def read(key: str) -> Mapping[str, Tensor]:
        tensor = torch.empty_like(shapes[key])
        with path.open("rb") as file:
            file.seek(8 + header_size + header[key]["data_offsets"][0])
            file.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        return keep(key, tensor if dtype is None else tensor.to(dtype))

    wanted = list(shapes if keys is None else keys)
    with ThreadPoolExecutor(READERS) as pool:
        return {name: tensor for kept in pool.map(read, wanted) for name, tensor in kept.items()}


def read_metadata(path: Path) -> dict[str, str] | None:
    """The free text in the header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; a model may be using the one that is replaced, and keeps it.

    An interruption leaves the old file or none, never half of one. ValueError where there is no room for it.
    """
    with replacing(path, one_writer=True) as part:
        part.touch()
        mode = part.stat().st_mode  # what the umask says: safetensors makes a file for its owner alone
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part, metadata)
        except SafetensorError as error:  # the system's, as where a disk is full
            raise ValueError(f"{path} cannot be written ({error}): make room, or allow larger files") from error
        part.chmod(mode)


def build(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Pi05:
    """A model of `tensors`: see `fill`."""
    model = Pi05.without_memory(config)
    fill(model, tensors)
    return model


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: Path | str = "the weights") -> None:
    """Let a model on the meta device take over tensors as they are: nothing is copied, nothing is initialised in vain.

    ValueError that lists every missing, unexpected and misshaped key; nothing is loaded by half.
    """
    check_keys(shapes_of(tensors), shapes_of(model.state_dict()), where=where)
    model.load_state_dict(tensors, assign=True)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def check_keys(
    found: TensorShapes,
    expected: TensorShapes,
    names: Mapping[str, str] | None = None,
    where: Path | str = "the weights",
) -> None:
    """ValueError that lists all keys in which two sets of tensors differ.

    names: {our key: key in the file}, to speak of keys as the file does.
    """
    names = names or {}
    problems = [f"missing: {names.get(key, key)} {list(expected[key])}" for key in expected if key not in found]
    problems += [f"unexpected: {names.get(key, key)} {list(found[key])}" for key in found if key not in expected]
    problems += [
        f"misshaped: {names.get(key, key)} is {list(found[key])}, expected {list(expected[key])}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if problems:
        raise ValueError(f"{where}: {len(problems)} keys do not fit the model\n  " + "\n  ".join(problems))
