"""A value as a run of `pi05 value fit` left it: frames in, the expected return out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pi05_lightning.acting.device import check_device
from pi05_lightning.data.attempts import Attempts, of_a_policy
from pi05_lightning.data.columns import rows_at
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.labels import VALUE_FILE
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.returns import monte_carlo
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.split import Split
from pi05_lightning.files.local import read_json
from pi05_lightning.models.heads.value import NAME, ValueHead
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.locate import locate_run, run_of
from pi05_lightning.weights.safetensors import ContentHash, fill
from pi05_lightning.weights.sharded_checkpoint import AVERAGE, PREFIX, STATE_DICT
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

BATCH = 64


@dataclass(frozen=True)
class AttemptDataset:
    """A dataset that a value is fitted on or asked about.  demonstrations: all of it succeeded."""

    path: str
    demonstrations: bool = False

    @cached_property
    def files(self) -> LeRobotFiles:
        return LeRobotFiles.open(find_dataset(self.path))

    @cached_property
    def attempts(self) -> Attempts:
        return Attempts.read(self.files, self.demonstrations)

    @cached_property
    def collected(self) -> bool:
        """Whether a policy made it in a simulator."""
        return of_a_policy(self.files)

    def returns(self, longest: dict[str, int], c_fail: float | None) -> np.ndarray:
        """Of every frame, f64[N] in [-1, 0].  longest: frames of the longest episode by task, of whichever dataset."""
        attempts = self.attempts
        return monte_carlo(attempts.left, attempts.success, self.scale(longest), c_fail)

    def rows(self, source: LeRobotSource) -> np.ndarray:
        """i64: where the frames of a source of this dataset are in `attempts`."""
        wanted = source.episode, source.columns.frame[source.rows]
        return rows_at(self.attempts.episode, self.attempts.frame, wanted)

    def scale(self, longest: dict[str, int]) -> np.ndarray:
        """i64[N]: of each frame's task the longest episode. Raises ValueError for a task of which that is not known."""
        if unknown := set(self.attempts.task) - longest.keys():
            known = ", ".join(longest)
            raise ValueError(
                f"{self.path}: the value knows nothing of the task {min(unknown)!r}, only of {known}: fit one on"
                " attempts at it too"
            )
        return np.array([longest[task] for task in self.attempts.task])


def datasets_of(rollouts: Sequence[str], demonstrations: Sequence[str]) -> list[AttemptDataset]:
    """Raises ValueError where none is named, one is named twice, or they differ in frames per second."""
    found = [*(AttemptDataset(path, demonstrations=True) for path in demonstrations), *map(AttemptDataset, rollouts)]
    if not rollouts:
        raise ValueError("rollouts: name at least one dataset of attempts, as `pi05 collect --policy` makes them")
    roots = [dataset.files.root.resolve() for dataset in found]
    if twice := {dataset.path for dataset, root in zip(found, roots, strict=True) if roots.count(root) > 1}:
        raise ValueError(f"{min(twice)} is named more than once: name each dataset once")
    rates = {dataset.files.fps: dataset.path for dataset in found}
    if len(rates) > 1:
        told = ", ".join(f"{path} has {fps:g} frames per second" for fps, path in rates.items())
        raise ValueError(f"{told}: returns count frames, so give datasets of one rate to a value")
    return found


def longest_of(datasets: Sequence[AttemptDataset]) -> dict[str, int]:
    """task -> frames of its longest episode in all the datasets."""
    found: dict[str, int] = {}
    for dataset in datasets:
        for task, length in dataset.attempts.longest.items():
            found[task] = max(length, found.get(task, 0))
    return found


def read_value(run: Path) -> tuple[TrainingCheckpoint, dict[str, Tensor]]:
    """The checkpoint of a run of `pi05 value fit`, and its weights, averaged ones where it has them.

    ValueError for one of a policy.
    """
    checkpoint = locate_run(run)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.content[STATE_DICT].items()}
    if not any(name.startswith(f"auxiliary.{NAME}.") for name in tensors):
        raise ValueError(f"{run} is no run of a value, but of a policy: make one with `pi05 value fit`")
    return checkpoint, tensors | checkpoint.content.get(AVERAGE, {})


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a value's weights, which labels carry too."""
    content = ContentHash()
    for name, tensor in tensors.items():
        content.add(name, tensor)
    return content.hexdigest()


class ValueFunction:
    """The model of a run of `pi05 value fit`, and what its numbers mean.

    longest: frames of a task's longest episode, which 1 stands for.  fps: frames per second of what it was fitted on.
    c_fail: steps that a failure costs.
    Raises ValueError for a run that is none of a value, or that was not fitted to its end.
    """

    def __init__(self, run: Path, device: str = "cpu") -> None:
        check_device(device)
        checkpoint, tensors = read_value(run)
        about: dict[str, Any] = read_json(run_of(run) / VALUE_FILE, default={})
        if not about.keys() >= {"longest", "fps", "c_fail"}:
            raise ValueError(
                f"{run} has no whole {VALUE_FILE}, so its value was not fitted to its end: start the same"
                " `pi05 value fit` again, which goes on with it, and give its directory"
            )
        self.processor = checkpoint.processor()
        self.model = Pi05.without_memory(checkpoint.config(), {NAME: ValueHead})
        fill(self.model, {name: tensor.float() for name, tensor in tensors.items()}, where=run)
        self.model.to(device).eval()
        self.sha256 = hash_of(tensors)
        self.longest: dict[str, int] = about["longest"]
        self.fps: float = about["fps"]
        self.c_fail: float | None = about["c_fail"]

    @torch.no_grad()
    def of(self, source: LeRobotSource) -> np.ndarray:
        """V of every frame of a source, f32[N]."""
        head = self.model.auxiliary[NAME]
        assert isinstance(head, ValueHead)
        robot, found = self.processor.acting[0], list[Tensor]()
        for rows in batched(tqdm(range(len(source)), unit="frame", desc=f"value of {source.name}"), BATCH):
            prompts = [self.processor.prompt(source[row], robot) for row in rows]
            batch = self.processor.collate(prompts).to(self.model.device)
            found.append(head.value(batch, self.model.backbone(batch)).cpu())
        return torch.cat(found).numpy() if found else np.zeros(0, np.float32)

    def opened(self, dataset: AttemptDataset, split: Split, options: dict[str, Any]) -> LeRobotSource:
        """A part of a dataset, as a source that this can be asked about."""
        config = LeRobotConfig(**{**options, "path": dataset.path})
        source = config.open(dataset.path, split, self.processor.shapes)
        if len(source):
            source.prepare()  # nothing may have been trained on it yet
        return source

    def everywhere(self, dataset: AttemptDataset, options: dict[str, Any]) -> np.ndarray:
        """V of every frame of a dataset, f64[N] in the order of its `Attempts`.

        Raises ValueError for a frame that cannot be read.
        """
        attempts = dataset.attempts
        opened = [self.opened(dataset, split, options | {"episodes": None}) for split in ("train", "val", "test")]
        rows = [dataset.rows(source) if len(source) else np.zeros(0, np.int64) for source in opened]
        if len(missing := np.setdiff1d(np.arange(len(attempts.episode)), np.concatenate(rows))):
            where = f"episode {attempts.episode[missing[0]]}, frame {attempts.frame[missing[0]]}"
            raise ValueError(
                f"{dataset.path}, {where}: it is left out as bad, or is in no split, and every frame needs a value:"
                " mend the frame, name its episode in the `splits` of meta/info.json, or delete it (LeRobot's"
                " lerobot-edit-dataset with --operation.type delete_episodes; into what it writes copy"
                " meta/pi05_collect.json, where there is one)"
            )
        value = np.empty(len(attempts.episode))
        for source, own in zip(opened, rows, strict=True):
            value[own] = self.of(source)
        return value
