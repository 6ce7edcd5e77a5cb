"""`pi05 convert`: checkpoints of LeRobot and openpi (PyTorch) to ours, ours to LeRobot, every key accounted for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from pi05_lightning.data.processor import Processor
from pi05_lightning.files.local import replacing
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.folder import PROCESSOR, save
from pi05_lightning.weights.lerobot import EMBEDDING, EXPERT_LM_HEAD, LM_HEAD, PREFIX, lerobot_tensors
from pi05_lightning.weights.lerobot import to_lerobot as to_lerobot_key
from pi05_lightning.weights.lerobot_folder import Foreign, LeRobotFolder, summarize
from pi05_lightning.weights.lerobot_processor import read_processor, write_lerobot
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.safetensors import (
    WEIGHTS,
    build,
    map_tensors,
    read_metadata,
    save_tensors,
    weight_files,
)

ORIGIN = "lerobot"
"""In a folder of ours that came from LeRobot: its own files, and the tensors that no loss reads, for the way back."""
UNREAD = "unread.safetensors"
LEROBOT_FILES = ("config.json", "train_config.json", "policy_*.json", "policy_*.safetensors")


def convert(
    *,
    source: Path,
    target: Path,
    format: Literal["ours", "lerobot"] = "ours",
    tokenizer: str | None = None,
    vision_heads: int | None = None,
    averaged: bool = True,
) -> None:
    """Convert a checkpoint and print what became of every key.

    Args:
        source: a folder with LeRobot's or openpi's (PyTorch) model.safetensors, its Hub id, or a checkpoint, run or
            folder of ours.
        target: the folder to make; it must not exist.
        format: what to make.
        tokenizer: folder or name of the text tokenizer; by default what the source names, which is PaliGemma's.
        vision_heads: attention heads of SigLIP, which no file tells; by default 72 dimensions each.
        averaged: of a training checkpoint of ours, take the averaged weights if it has them.
    """
    if target.exists():
        raise ValueError(f"{target} already exists: delete it or name another target")
    weights = locate(source, averaged=averaged, tokenizer=tokenizer, vision_heads=vision_heads)
    with replacing(target, one_writer=True) as folder:
        folder.mkdir()
        report = to_ours(weights, folder) if format == "ours" else to_lerobot(weights, folder)
    print("\n".join([*report, f"written to {target}"]))


def to_ours(weights: Weights, folder: Path) -> list[str]:
    """Write a folder of ours; returns the report."""
    if isinstance(weights, LeRobotFolder):
        return from_lerobot(weights, folder)
    processor, model = weights.processor(), weights.model()
    save(folder, model, processor, weights.trained)
    return summarize((key, tensor, "as it is") for key, tensor in model.state_dict().items())


def from_lerobot(weights: LeRobotFolder, folder: Path) -> list[str]:
    """Write a folder of ours, of LeRobot's or openpi's tensor by tensor from disk to disk; returns the report."""
    foreign = weights.mapped
    processor: Processor | None = None
    try:
        text = weights.text_tokenizer()
    except ValueError as error:
        if weights.tokenizer is not None:
            raise
        notes = [
            f"written without {PROCESSOR}, as the tokenizer cannot be had: the weights are whole, a policy needs the"
            f" tokenizer too; convert again with --tokenizer FOLDER ({error})"
        ]
    else:
        processor, notes = read_processor(weights.path, foreign.config, text)
    save(folder, build(foreign.config, foreign.tensors), processor)
    keep_origin(weights.path, foreign, folder / ORIGIN)
    return [foreign.report(), *notes]


def keep_origin(source: Path, foreign: Foreign, origin: Path) -> None:
    """Keep LeRobot's own files, and of the tensors that no loss reads those that nothing else tells."""
    origin.mkdir()
    for pattern in LEROBOT_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, origin / file.name)
    # an lm_head that never drifted from the embedding is written again from it
    drifted = {
        key: tensor
        for key, tensor in foreign.unread.items()
        if key != PREFIX + LM_HEAD or not torch.equal(tensor, foreign.tensors[EMBEDDING])
    }
    save_tensors(drifted, origin / UNREAD, read_metadata(weight_files(source)[0]))


def to_lerobot(weights: Weights, folder: Path) -> list[str]:
    """Write a folder that LeRobot's `PI05Policy.from_pretrained` opens; returns the report."""
    if isinstance(weights, LeRobotFolder):
        raise ValueError(f"{weights.path} is no checkpoint of ours: convert it to ours first, then to lerobot")
    origin = weights.path / ORIGIN
    came = origin.is_dir()
    # what came without a tokenizer goes as it came
    processor = None if came and not (weights.path / PROCESSOR).is_file() else weights.processor()
    model = weights.model()
    unread = map_tensors(origin / UNREAD) if came else {}
    tensors = lerobot_tensors(model.state_dict(), unread)
    save_tensors(tensors, folder / WEIGHTS, read_metadata(origin / UNREAD) if came else None)
    notes: list[str] = []
    if processor is not None and not (came and same_statistics(origin, model.config, processor)):
        notes = write_lerobot(folder, model.config, processor, model.backbone.embed_tokens.weight.dtype)
    else:
        for file in origin.iterdir():
            if file.name != UNREAD:
                shutil.copyfile(file, folder / file.name)

    fate = {to_lerobot_key(key): f"<- {key}" for key in model.state_dict()}
    fate |= dict.fromkeys(unread, "<- kept aside when the checkpoint came")
    made = {PREFIX + LM_HEAD: "<- the embedding", PREFIX + EXPERT_LM_HEAD: "<- zeros, as no loss reads it"}
    lines = summarize((key, tensor, (made | fate)[key]) for key, tensor in tensors.items())
    return [*lines, f"{len(tensors)} keys", *notes]


def same_statistics(origin: Path, config: ModelConfig, processor: Processor) -> bool:
    """Whether LeRobot's files still say what the processor does; not after training on other data."""
    return read_processor(origin, config, processor.tokenizer)[0].to_dict() == processor.to_dict()
