"""A checkpoint as openpi's JAX code saves it: `params/` and `assets/`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi05_lightning.files.local import read_json
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.lerobot import config_of
from pi05_lightning.weights.lerobot_folder import Foreign, LeRobotFolder
from pi05_lightning.weights.orbax import LORA_A, TRAIN_STATE, OrbaxParams, checkpoint_folder, ours, vision_heads
from pi05_lightning.weights.safetensors import CONFIG, READERS, Keep, check_keys, keep_all, shapes_of


class OpenpiFolder(LeRobotFolder):
    """What Orbax wrote, read with it: all parameters at once, and only when they are asked for.

    averaged: the parameters that it is used with, which are the average if training kept one; else those that training
        goes on with, if they are there too.
    untold: what no file tells, as of `LeRobotFolder`.
    """

    def __init__(self, path: Path, averaged: bool = True, **untold: Any) -> None:
        super().__init__(checkpoint_folder(path), **untold)
        self.params = OrbaxParams(self.path, averaged)

    @cached_property
    def mapped(self) -> Foreign:
        """Dimensions, names and shapes; its tensors have no values. ValueError that lists all that does not fit."""
        theirs = self.params.on_meta()
        tensors, source = ours(theirs, self.params.place)
        given, heads = self.vision_heads, vision_heads(theirs)
        if None not in (given, heads) and given != heads:
            raise ValueError(f"{self.params.place} says {heads} heads of SigLIP, not {given}: leave out vision_heads")
        heads = heads if given is None else given
        config, notes = config_of(shapes_of(tensors), read_json(self.path / CONFIG, default={}), heads, self.horizon)
        expected = shapes_of(Pi05.without_memory(config).state_dict())
        check_keys(shapes_of(tensors), expected, source, self.params.place)
        if any(LORA_A in name for name in theirs):
            notes.append("LoRA is merged into its weights at the scale of openpi's variants, 1")
        if not self.params.averaged and not (self.path / TRAIN_STATE).is_dir():
            notes.append(f"{TRAIN_STATE} is not there: these are the average, if training kept one")
        return Foreign(config, tensors, {}, {}, source, tuple(notes))

    def tensors(self, dtype: torch.dtype | None = None, keep: Keep = keep_all) -> dict[str, Tensor]:
        _ = self.mapped  # what does not fit shows before gigabytes are read
        found, _ = ours(self.params.tensors(), self.params.place)

        def kept(name: str) -> dict[str, Tensor]:
            tensor = found.pop(name)
            return dict(keep(name, tensor if dtype is None else tensor.to(dtype)))

        with ThreadPoolExecutor(READERS) as pool:
            return {name: tensor for part in pool.map(kept, list(found)) for name, tensor in part.items()}

    def mapped_tensors(self) -> dict[str, Tensor]:
        return self.tensors()
