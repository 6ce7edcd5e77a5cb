"""A folder of LeRobot's or openpi's π0.5 (PyTorch): its weights as ours, with an account of every key."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.files.local import read_json
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import ELSEWHERE
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.lerobot import (
    DROPPED,
    EMBED_TOKENS,
    EXPERT_LM_HEAD,
    LM_HEAD,
    PREFIX,
    UNREAD,
    config_of,
    to_lerobot,
    to_ours,
)
from pi05_lightning.weights.lerobot_processor import read_processor, tokenizer_name
from pi05_lightning.weights.safetensors import CONFIG, Keep, check_keys, keep_all, map_weights, read_weights, shapes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint: its dimensions, its tensors under our names, what no loss reads, where all came from."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    unread: dict[str, Tensor]
    """Under LeRobot's names."""
    dropped: dict[str, Tensor]
    """Under the file's names."""
    source: dict[str, str]
    """Our key: the key in the file."""
    notes: tuple[str, ...]
    """What neither the weights nor their config say, and what was taken for it."""

    def report(self) -> str:
        """Every key of the file and what became of it."""
        rows = [(theirs, self.tensors[ours], f"-> {ours}") for ours, theirs in self.source.items()]
        rows += [(theirs, tensor, "no loss reads it: kept aside") for theirs, tensor in self.unread.items()]
        rows += [(theirs, tensor, "π0's, which π0.5 does not have: dropped") for theirs, tensor in self.dropped.items()]
        total = (
            f"{len(rows)} keys: {len(self.source)} read, {len(self.unread)} kept aside, {len(self.dropped)} dropped,"
            " none left over"
        )
        return "\n".join([*summarize(rows), total, *self.notes])


def summarize(rows: Iterable[tuple[str, Tensor, str]]) -> list[str]:
    """(key, its tensor, what became of it) per tensor, as lines; layers with the same fate share one."""
    groups: dict[tuple[str, ...], int] = {}
    for key, tensor, fate in sorted(rows, key=lambda row: row[0]):
        every = re.sub(r"layers\.\d+", "layers.*", key), re.sub(r"layers\.\d+", "layers.*", fate)
        line = every[0], str(list(tensor.shape)), every[1]
        groups[line] = groups.get(line, 0) + 1
    return [f"{count:3} × {' '.join(line)}" for line, count in groups.items()]


class LeRobotFolder(Weights):
    """`model.safetensors` and `config.json` of LeRobot's or openpi's.

    tokenizer: where PaliGemma's text tokenizer is, if not where the folder says.
    vision_heads: attention heads of SigLIP, which no file tells; 72 dimensions each if the width divides, else 16.
    horizon: actions of a chunk, where no file tells.  fps: of them a second, which none does.
    """

    trained = ELSEWHERE

    def __init__(
        self,
        path: Path,
        tokenizer: str | None = None,
        vision_heads: int | None = None,
        horizon: int | None = None,
        fps: float | None = None,
    ) -> None:
        super().__init__(path)
        self.tokenizer, self.vision_heads, self.horizon, self.fps = tokenizer, vision_heads, horizon, fps

    @cached_property
    def mapped(self) -> Foreign:
        """All that the weights' files hold, mapped from the disk: nothing of it is read yet.

        ValueError that lists every missing, unexpected or misshaped key and every contradiction of config.json; also
        for a truncated file. The embedding is `embed_tokens`; only where it is missing (openpi ties them), `lm_head`.
        """
        found: dict[str, tuple[str, Tensor]] = {}
        unknown: dict[str, tuple[int, ...]] = {}
        for theirs, tensor in map_weights(self.path).items():
            if theirs.removeprefix(PREFIX) in found:  # with and without the prefix
                unknown[theirs] = tuple(tensor.shape)
            found.setdefault(theirs.removeprefix(PREFIX), (theirs, tensor))
        if EMBED_TOKENS not in found and LM_HEAD in found:
            found[EMBED_TOKENS] = found.pop(LM_HEAD)
        unread = {PREFIX + key: found.pop(key)[1] for key in UNREAD if key in found}
        dropped = dict(found.pop(key) for key in list(found) if key.startswith(DROPPED))
        tensors: dict[str, Tensor] = {}
        source: dict[str, str] = {}
        for key, (theirs, tensor) in found.items():
            ours = to_ours(key)
            if ours is None or ours in tensors:
                unknown[theirs] = tuple(tensor.shape)
            else:
                tensors[ours], source[ours] = tensor, theirs

        shapes = shapes_of(tensors)
        config, notes = config_of(shapes, read_json(self.path / CONFIG, default={}), self.vision_heads, self.horizon)
        expected = shapes_of(Pi05.without_memory(config).state_dict())
        names = {ours: to_lerobot(ours) for ours in expected} | source
        heads = {PREFIX + LM_HEAD: config.language.width, PREFIX + EXPERT_LM_HEAD: config.expert.width}
        expected |= {key: (config.vocab_size, width) for key, width in heads.items() if key in unread}
        check_keys(shapes | shapes_of(unread) | unknown, expected, names, self.path)
        return Foreign(config, tensors, unread, dropped, source, tuple(notes))

    def config(self) -> ModelConfig:
        return self.mapped.config

    @property
    def notes(self) -> list[str]:
        return [*self.mapped.notes]

    def model(self, dtype: torch.dtype | None = None) -> Pi05:
        for note in self.notes:
            log.warning("%s: %s", self.path, note)
        return super().model(dtype)

    def tensors(self, dtype: torch.dtype | None = None, keep: Keep = keep_all) -> dict[str, Tensor]:
        """Each is read once, into memory of its own; the heads that no loss reads are left out."""
        ours = {theirs: name for name, theirs in self.mapped.source.items()}
        return read_weights(self.path, ours, dtype, lambda theirs, tensor: keep(ours[theirs], tensor))

    def mapped_tensors(self) -> dict[str, Tensor]:
        return self.mapped.tensors

    def named_tokenizer(self) -> str:
        """Folder or name of the text tokenizer. ValueError where the preprocessor is damaged, or names two."""
        return self.tokenizer or tokenizer_name(self.path)

    def processor(self) -> Processor:
        text = TextTokenizer.load(self.named_tokenizer())  # first: it is what may be missing
        processor, notes = read_processor(self.path, self.config(), text, self.fps)
        for note in notes:
            log.warning("%s: %s", self.path, note)
        return processor
