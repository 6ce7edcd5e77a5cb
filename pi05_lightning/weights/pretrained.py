"""Weights to begin a training with: a checkpoint of ours, or a folder of LeRobot's or openpi's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pi05_lightning.files.hub import local_folder
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights import training_checkpoint as checkpoint
from pi05_lightning.weights.lerobot import is_foreign, load_lerobot, map_foreign
from pi05_lightning.weights.safetensors import CONFIG, check_keys, load_model, read_json, weight_files


def config_at(path: str | Path) -> ModelConfig:
    """The dimensions of what `load_into` would load. ValueError when there is nothing to load at `path`."""
    path = local_folder(path)
    if is_foreign(path):
        return map_foreign(path).config
    if weight_files(path):
        return ModelConfig.from_dict(read_json(path / CONFIG))
    found = checkpoint.read_training_checkpoint(checkpoint.find_checkpoint(path))
    return ModelConfig.from_dict(found["pi05"]["model"])


def load_into(model: Pi05, path: str | Path, dtype: torch.dtype) -> None:
    """Give a model on the meta device the weights at a path, as `dtype`; of a run, the averaged ones if it has them.

    path: a folder with model.safetensors, ours, LeRobot's or openpi's, or its Hub id; a `.ckpt` file, or a run's
    directory.
    ValueError that lists every key that does not fit; nothing is loaded by half.
    """
    tensors = _read(local_folder(path), dtype)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_keys({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, where=path)
    model.load_state_dict(tensors, assign=True)


def _read(path: Path, dtype: torch.dtype) -> Mapping[str, Tensor]:
    if is_foreign(path):
        return load_lerobot(path, dtype=dtype)[1]
    if weight_files(path):
        return load_model(path, dtype).state_dict()
    found = checkpoint.trained_model(checkpoint.read_training_checkpoint(checkpoint.find_checkpoint(path)))
    # copied: mapped from a file that may be replaced, they would be read from it page by page while training
    return {name: tensor.to(dtype, copy=True) for name, tensor in found.state_dict().items()}
