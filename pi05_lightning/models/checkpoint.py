"""Weights on disk and in memory: strict loading into a model that is built on the meta device, and atomic saving."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05

WEIGHTS = "model.safetensors"
Sizes = Mapping[str, tuple[int, ...]]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped from it: memory is taken page by page as they are read, never twice.

    ValueError if the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder that holds {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): copy or download it again") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; a model may be using the one that is replaced, and keeps it.

    An interruption leaves the old file or none, never half of one.
    """
    part = path.with_name(path.name + ".part")
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, part, {"format": "pt"})
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError with the line if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def build(config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Pi05:
    """A model that takes over `tensors` as they are (or cast to `dtype`): nothing is initialised to be thrown away.

    ValueError that lists every missing, unexpected and misshaped key.
    """
    with torch.device("meta"):
        model = Pi05(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    check_keys({key: tuple(tensor.shape) for key, tensor in tensors.items()}, expected)
    model.load_state_dict({key: tensor.to(dtype or tensor.dtype) for key, tensor in tensors.items()}, assign=True)
    return model


def check_keys(
    found: Sizes, expected: Sizes, names: Mapping[str, str] | None = None, where: Path | str = "the weights"
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
