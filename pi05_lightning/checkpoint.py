"""A policy on disk: a training checkpoint, a run's directory, or an exported folder of safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pi05_lightning.data.processor import Processor
from pi05_lightning.models.checkpoint import WEIGHTS, build, read_json, read_tensors, save_tensors
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05

CONFIG, PROCESSOR = "config.json", "processor.json"


def save(folder: str | Path, model: Pi05, processor: Processor) -> None:
    """Export: model.safetensors, config.json (dimensions) and processor.json (tokenizers, statistics, prompts)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROCESSOR).write_text(json.dumps(processor.to_dict()), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2), encoding="utf-8")
    save_tensors(model.state_dict(), folder / WEIGHTS)


def load(path: str | Path) -> tuple[Pi05, Processor]:
    """Model and processor from a `.ckpt` file, a run's directory (its newest checkpoint) or an exported folder.

    Raises ValueError for anything else, and when weights and configuration do not fit; nothing is loaded by half.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        config = ModelConfig.from_dict(read_json(path / CONFIG))
        return build(config, read_tensors(path / WEIGHTS)), Processor.from_dict(read_json(path / PROCESSOR))
    checkpoint = read_training_checkpoint(find_checkpoint(path))
    config = ModelConfig.from_dict(checkpoint["pi05"]["model"])
    weights = {key.removeprefix("model."): tensor for key, tensor in checkpoint["state_dict"].items()}
    return build(config, weights), Processor.from_dict(checkpoint["pi05"]["processor"])


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file itself, or the newest one in a run's directory; ValueError where there is none."""
    if path.is_file():
        return path
    candidates = (*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt"))
    # last.ckpt may be a link whose target a killed process had just replaced
    found = sorted((file for file in candidates if file.exists()), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint nor a folder with one: expected a .ckpt file, a run's directory with"
            f" checkpoints/, or an exported folder with {WEIGHTS}"
        )
    return found[-1]


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint of ours, tensors mapped from the file; executes nothing that it may contain."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "pi05" not in checkpoint:
        raise ValueError(f"{path} is a checkpoint of something else: it has no `pi05` entry")
    return checkpoint
