"""Exported weights: a folder with tensors, dimensions, processor, and what they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi05_lightning.data.processor import Processor
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import UNKNOWN, Trained
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.safetensors import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Keep,
    check_keys,
    keep_all,
    map_weights,
    read_weights,
    save_tensors,
    shapes_of,
)

PROCESSOR, TRAINED = "processor.json", "trained.json"
PLUGIN, MODEL = "pi05_lightning", "model"
"""In a config.json that is LeRobot's: the type of a policy of ours, and under which key the dimensions are."""


def is_exported(values: Mapping[str, Any]) -> bool:
    """Whether the values of a folder's config.json say that it is one that `save` wrote."""
    return "backbone_type" in values or values.get("type") == PLUGIN


class ExportedFolder(Weights):
    """What `save` wrote.

    fps: actions per second of the robots whose rate it does not say, as where it came from LeRobot or openpi.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        super().__init__(path)
        self.fps = fps

    def config(self) -> ModelConfig:
        values = read_json(self.path / CONFIG)
        try:
            return ModelConfig.from_dict(values[MODEL] if values.get("type") == PLUGIN else values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{self.path / CONFIG} does not describe a model of pi05_lightning ({error})") from error

    def tensors(self, dtype: torch.dtype | None = None, keep: Keep = keep_all) -> dict[str, Tensor]:
        return read_weights(self.path, None, dtype, keep)

    def mapped_tensors(self) -> dict[str, Tensor]:
        return map_weights(self.path)

    def check_policy(self) -> None:
        """ValueError where there is no processor, which no tokenizer alone makes."""
        if not (self.path / PROCESSOR).is_file():
            raise ValueError(
                f"{self.path} has weights but no {PROCESSOR}, as it was converted without a tokenizer: convert what it"
                " came from, LeRobot's or openpi's folder, again with --tokenizer FOLDER"
            )

    def processor(self) -> Processor:
        self.check_policy()
        processor = Processor.from_dict(read_json(self.path / PROCESSOR))
        if self.fps is not None:
            untold = {name: robot for name, robot in processor.robots.items() if not robot.fps_is_known}
            if not untold:
                raise ValueError(f"fps: {self.path} says that itself")
            processor.robots |= {
                name: replace(robot, fps=self.fps, fps_is_known=True) for name, robot in untold.items()
            }
        return processor

    @property
    def trained(self) -> Trained:
        return Trained.from_dict(read_json(self.path / TRAINED, default={}))


def save(
    folder: str | Path,
    model: Pi05,
    processor: Processor | None = None,
    trained: Trained = UNKNOWN,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Export a folder: model.safetensors, config.json (dimensions), processor.json (tokenizers, statistics, prompts).

    trained.json says what the weights were trained on.  Without a processor they are no policy, but weights to begin a
    training with.  tensors: the model's, where they are not in itself, as while ranks divide them.  Heads of one's own
    are left out.  What fails on the way leaves no policy, as config.json is gone until all is written.  Raises
    ValueError for a folder of other weights, and for a model with adapters or a quantised base.
    """
    folder = Path(folder)
    before, ours = read_json(folder / CONFIG, default={}), (folder / TRAINED).exists()
    if (folder / INDEX).exists() or ((before or (folder / WEIGHTS).exists()) and not (ours or is_exported(before))):
        raise ValueError(f"{folder} holds weights that were not exported here: name another folder")
    own = {name: x for name, x in (tensors or model.state_dict()).items() if not name.startswith("auxiliary.")}
    plain = Pi05.without_memory(model.config)
    check_keys(shapes_of(own), shapes_of(plain.state_dict()), where="a model that is exported")
    (folder / CONFIG).unlink(missing_ok=True)  # it is written last: without it half of a folder is no policy
    if processor is not None:
        write_json(folder / PROCESSOR, processor.to_dict(), indent=None)
    write_json(folder / TRAINED, asdict(trained))
    save_tensors(own, folder / WEIGHTS)
    write_json(folder / CONFIG, model.config.to_dict())
