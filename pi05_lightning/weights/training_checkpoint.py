"""Training checkpoints: what a run wrote, found, read, and turned into a plain model's tensors.

They are one file, or of a sharded run a directory; nobody else asks which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from itertools import batched
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pi05_lightning.data.processor import Processor
from pi05_lightning.files.local import shown
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.models.shards import own_part, slice_of
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.adapter_base import AdapterBase
from pi05_lightning.weights.adapters import merge
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.safetensors import WEIGHTS, ContentHash, Keep, check_keys, keep_all, shapes_of
from pi05_lightning.weights.sharded_checkpoint import AVERAGE, PREFIX, STATE_DICT, is_sharded, keys_of, load, read_rest
from pi05_lightning.weights.shards import ShardReader, read_layout

ONLY_TRAINED = "auxiliary."
"""What the names of heads that only training has begin with."""
AT_A_TIME = 8  # tensors that are read for their hash
LEROBOT = tuple(f"{above}pretrained_model" for above in ("", "*/", "checkpoints/*/"))
"""Where in a folder of LeRobot's training the weights are; `last` comes after the numbers of steps."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


class TrainingCheckpoint(Weights):
    """A Lightning checkpoint of ours, which `Pi05Module` wrote, by one device or by sharded ranks.

    averaged: take the averaged weights if it has any.  find_base: finds the base that a checkpoint of adapters leaves
    out, if its tensors are to be read.
    """

    def __init__(
        self, path: Path, averaged: bool = True, find_base: Callable[[AdapterBase], Weights] | None = None
    ) -> None:
        super().__init__(path)
        self.averaged, self._find_base = averaged, find_base
        self.errors: list[float] = []
        """Of each layer of a quantised base, once the tensors were read, see `QuantizedLinear`."""

    @cached_property
    def content(self) -> dict[str, Any]:
        """All that it holds, tensors mapped from the file; of a directory their names alone.

        ValueError for a file that is truncated, holds more than tensors and plain types, or is something else's.
        """
        return read_rest(self.path) if is_sharded(self.path) else load(self.path)

    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.content["pi05"]["model"])

    def tensors(self, dtype: torch.dtype | None = None, keep: Keep = keep_all) -> dict[str, Tensor]:
        saved, own = self.content["pi05"], self._own(dtype)
        if saved.get("lora") is not None:
            frozen = None
            if (base := self.adapter_base) is not None and self._find_base is not None:
                frozen = partial(self._find_base(base).tensors, getattr(torch, base.dtype))
            self.errors = []
            return merge(self.config(), Lora(**saved["lora"]), own, saved.get("base"), frozen, dtype, keep, self.errors)
        kept: dict[str, Tensor] = {}
        copy = not is_sharded(self.path)  # mapped ones would change with a file that another is written over
        for name, tensor in own.items():
            kept |= keep(name, tensor.to(dtype or tensor.dtype, copy=copy))
        return kept

    def mapped_tensors(self) -> dict[str, Tensor]:
        return self.tensors() if self.content["pi05"].get("lora") is not None else self._own(None)

    def _own(self, dtype: torch.dtype | None, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """What it holds of the model, averaged or not: of a file as it is, but what is averaged in `dtype`.

        names: of those that are wanted, by default all.
        """
        names = self._keys if names is None else names
        if is_sharded(self.path):
            layout = read_layout(self.path)
            like = {name: layout[f"{STATE_DICT}/{PREFIX}{name}"] for name in names}
            tensors = {name: torch.empty(shape, dtype=dtype or saved) for name, (shape, saved) in like.items()}
            ShardReader(self.path).fill({self._keys[name]: tensor for name, tensor in tensors.items()})
            return tensors
        average = self.content.get(AVERAGE, {}) if self.averaged else {}
        own = {name: self.content[STATE_DICT][PREFIX + name] for name in names}
        return own | {name: average[name].to(dtype or own[name].dtype) for name in average.keys() & own.keys()}

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Of a policy's weights by their names in the model: the keys in a directory."""
        keys = keys_of(self.content, self.averaged)
        return {name: key for name, key in keys.items() if not name.startswith(ONLY_TRAINED)}

    @property
    def own_heads(self) -> set[str]:
        """The auxiliary heads that it was trained with, which no policy has."""
        return {name.split(".")[1] for name in keys_of(self.content, averaged=False) if name.startswith(ONLY_TRAINED)}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        if self.content["pi05"].get("lora") is not None:
            return self._fill_merged(targets)
        if not is_sharded(self.path):
            return super().fill(targets)
        layout, keys = read_layout(self.path), self._keys
        check_keys({name: tuple(layout[key][0]) for name, key in keys.items()}, shapes_of(targets), where=self.path)
        ShardReader(self.path).fill({keys[name]: target for name, target in targets.items()})

    def _fill_merged(self, targets: Mapping[str, Tensor]) -> None:
        """Layers are merged as a whole, one after another, for the same bits whatever a rank keeps of them."""
        found: dict[str, tuple[int, ...]] = {}

        def keep(name: str, tensor: Tensor) -> dict[str, Tensor]:
            found[name], target = tuple(tensor.shape), targets.get(name)
            if target is not None and target.shape == tensor.shape:
                own_part(target.detach()).copy_(slice_of(tensor, target))
            return {}

        self.tensors(keep=keep)
        check_keys(found, shapes_of(targets), where=self.path)

    @property
    def adapter_base(self) -> AdapterBase | None:
        """The base that it leaves out, if it does."""
        saved = self.content["pi05"].get("adapter_base")
        return None if saved is None else AdapterBase(**saved)

    def content_hash(self) -> str:
        """Of what it holds itself, adapters apart from their base: what merging rounds to depends on the machine."""
        content = ContentHash()
        with torch.device("cpu"):  # the trainer may make tensors elsewhere
            for some in batched(self._keys, AT_A_TIME):
                for name, tensor in self._own(None, some).items():
                    content.add(name, tensor)
            if self.adapter_base is not None:
                content.add(f"base {self.adapter_base.sha256}", torch.empty(0))
        return content.hexdigest()

    @property
    def notes(self) -> list[str]:
        if not self.errors:
            return []
        return [
            f"the base was trained beside in {self.content['pi05']['base']}: {len(self.errors)} layers are dequantised,"
            f" which differ from the weights they were made of by {mean(self.errors):.2%} on average and"
            f" {max(self.errors):.2%} at most (norm of the difference over that of the weight)"
        ]

    def processor(self) -> Processor:
        return Processor.from_dict(self.content["pi05"]["processor"])

    @property
    def trained(self) -> Trained:
        return Trained.from_dict(self.content["pi05"].get("trained", {}))

    @property
    def steps(self) -> int:
        """Optimizer steps after which it was saved."""
        return int(self.content["global_step"])

    @property
    def saved_at(self) -> float:
        """When it was saved, in seconds since 1970; of an old one the file's date, which a copy changes."""
        return float(self.content["pi05"].get("saved_at", self.path.stat().st_mtime))

    def run_config(self) -> str:
        """The configuration, as YAML, that it was trained with. ValueError when it carries none."""
        if "config" not in self.content:
            raise ValueError(
                f"{self.path} carries no configuration (`pi05 fit` did not write it): give it with -c FILE"
            )
        # what rollouts during training were told before `actions` had a name
        old = {"use_flow_matching: true": "actions: flow", "use_flow_matching: false": "actions: fast"}
        return re.sub("|".join(old), lambda found: old[found[0]], self.content["config"])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's directory."""
    candidates = (*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt"))
    # last.ckpt may be a link whose target a killed process had just replaced
    return [path for path in candidates if is_checkpoint(path)]


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint itself, a file or a sharded run's directory, and not a folder with some."""
    return path.is_file() or is_sharded(path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the one that was saved last in a run's directory.

    ValueError where there is none, and for a damaged one.
    """
    if is_checkpoint(path):
        return path
    found = checkpoints_in(path)
    if not found and (pickles := [file.name for kind in PICKLES for file in path.glob(kind)]):
        raise ValueError(
            f"{path} holds only pickled weights ({', '.join(pickles)}), which are not read as they may execute code:"
            f" save them as {WEIGHTS} with the package that wrote them"
        )
    if not found:
        runs = [folder for folder in sorted(path.glob("*/")) if checkpoints_in(folder)]
        lerobots = [folder for place in LEROBOT for folder in sorted(path.glob(place), reverse=True)]
        below = next(iter(runs + lerobots), None)
        raise ValueError(
            f"{shown(path)} is neither a checkpoint nor a folder with one: expected a .ckpt, a run's directory"
            f" with checkpoints/, or an exported folder with {WEIGHTS}{f' (did you mean {below}?)' if below else ''}"
        )
    checkpoints = map(TrainingCheckpoint, found)
    return max(checkpoints, key=lambda checkpoint: (checkpoint.saved_at, checkpoint.steps)).path
