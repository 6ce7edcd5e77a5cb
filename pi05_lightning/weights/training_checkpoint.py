"""A policy on disk: a training checkpoint, a run's directory, a folder of ours, of LeRobot's or of openpi's."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.files.hub import local_folder
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora, add_adapters, merge_adapters
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.lerobot import is_foreign, load_lerobot
from pi05_lightning.weights.lerobot_processor import read_processor, tokenizer_name
from pi05_lightning.weights.safetensors import (
    WEIGHTS,
    build,
    check_keys,
    load_model,
    read_json,
    save_model,
    weight_files,
)

PROCESSOR = "processor.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def save(folder: str | Path, model: Pi05, processor: Processor) -> None:
    """Export: model.safetensors, config.json (dimensions) and processor.json (tokenizers, statistics, prompts)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROCESSOR).write_text(json.dumps(processor.to_dict()), encoding="utf-8")
    save_model(folder, model)


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, tokenizer: str | None = None, averaged: bool = True
) -> tuple[Pi05, Processor]:
    """Model and processor from a `.ckpt` file, a run's directory (its newest checkpoint), a folder or a Hub id.

    The folder is one of ours, or LeRobot's or openpi's: then `tokenizer` says where PaliGemma's text tokenizer is, if
    not where the folder says.  Weights are cast to `dtype` while they are read; a training checkpoint's are the
    averaged ones if it has any and `averaged` is left on.
    Raises ValueError for anything else, and when weights and configuration do not fit; nothing is loaded by half.
    """
    path = local_folder(path)
    if is_foreign(path):
        text = TextTokenizer.load(tokenizer or tokenizer_name(path))
        model = build(*load_lerobot(path, dtype=dtype))
        return model, read_processor(path, model.config, text)[0]
    if weight_files(path):
        if not (path / PROCESSOR).is_file():
            raise ValueError(
                f"{path} has weights but no {PROCESSOR}, as it was converted without a tokenizer: convert it again with"
                " --tokenizer FOLDER"
            )
        processor = Processor.from_dict(read_json(path / PROCESSOR))
        return load_model(path, dtype), processor
    checkpoint = read_training_checkpoint(find_checkpoint(path))
    model = trained_model(checkpoint, dtype=dtype, averaged=averaged)
    return model, Processor.from_dict(checkpoint["pi05"]["processor"])


def trained_model(checkpoint: Mapping[str, Any], *, dtype: torch.dtype | None = None, averaged: bool = True) -> Pi05:
    """The model of a training checkpoint: averaged weights if there are any and they are wanted, adapters merged."""
    weights: dict[str, Tensor] = {key.removeprefix("model."): x for key, x in checkpoint["state_dict"].items()}
    average: Mapping[str, Tensor] = checkpoint.get("ema", {}) if averaged else {}
    weights = {key: average.get(key, tensor).to(dtype or tensor.dtype) for key, tensor in weights.items()}
    config, lora = ModelConfig.from_dict(checkpoint["pi05"]["model"]), checkpoint["pi05"].get("lora")
    return build(config, weights) if lora is None else build_merged(config, Lora(**lora), weights)


def build_merged(config: ModelConfig, lora: Lora, tensors: Mapping[str, Tensor]) -> Pi05:
    """The plain model that a checkpoint with adapters amounts to; takes over `tensors` and adds the adapters into them.

    ValueError that lists every missing, unexpected and misshaped key.
    """
    with torch.device("meta"):
        model = Pi05(config)
    add_adapters(model, lora)
    check_keys(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )
    model.load_state_dict(tensors, assign=True)
    return merge_adapters(model)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file itself, or the newest one in a run's directory; ValueError where there is none."""
    if path.is_file():
        return path
    candidates = (*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt"))
    # last.ckpt may be a link whose target a killed process had just replaced
    found = sorted((file for file in candidates if file.exists()), key=lambda file: file.stat().st_mtime)
    if not found and (pickles := [file.name for kind in PICKLES for file in path.glob(kind)]):
        raise ValueError(
            f"{path} holds only pickled weights ({', '.join(pickles)}), which are not read as they may execute code:"
            f" save them as {WEIGHTS} with the package that wrote them"
        )
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint nor a folder with one: expected a .ckpt file, a run's directory with"
            f" checkpoints/, or an exported folder with {WEIGHTS}"
        )
    return found[-1]


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint of ours, tensors mapped from the file; executes nothing that it may contain.

    ValueError for a file that is truncated, holds more than tensors and plain types, or is something else's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is truncated, or no checkpoint of tensors and plain types, and nothing else is read"
            f" ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(checkpoint, dict) or "pi05" not in checkpoint:
        raise ValueError(f"{path} is a checkpoint of something else: it has no `pi05` entry")
    return checkpoint
