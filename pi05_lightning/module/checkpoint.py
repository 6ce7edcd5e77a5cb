"""What the checkpoints of a run hold beside Lightning's state, and whether a run can go on from one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.data.differences import size_differences, sizes_of
from pi05_lightning.data.processor import Processor
from pi05_lightning.files.hub import is_on_hub
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.module.blueprint import Blueprint
from pi05_lightning.module.callback_states import arguments, find_states, reapply
from pi05_lightning.module.trainer import callbacks_of
from pi05_lightning.ranks import of_all_ranks
from pi05_lightning.recipe import Recipe
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.left_out import LeftOut
from pi05_lightning.weights.resumed import (
    check_data,
    check_model,
    check_origin,
    check_resumable,
    check_steps,
    has_options,
)
from pi05_lightning.weights.safetensors import shapes_of
from pi05_lightning.weights.sharded_checkpoint import PREFIX, STATE_DICT


class Checkpoints:
    """Those of one module. What they leave out is what adapters were put into, where that is on disk.

    init_from: the weights that the run began with, as the user named them.
    """

    def __init__(self, blueprint: Blueprint, init_from: str | None) -> None:
        self.blueprint, self.init_from = blueprint, init_from
        self.hub_id: str | None = None
        """The Hub's name of the weights that the run began with, where they came from there."""
        self._left_out = None if blueprint.lora is None else LeftOut(blueprint.lora)
        self._saved_at = 0.0
        """When this run was saved last, also before it was resumed: no checkpoint is older, whatever a clock says."""
        self._given_arguments: dict[str, dict[str, Any]] = {}
        """Of the trainer's callbacks, before a checkpoint's state, see `reapply`."""
        self._saved_arguments: dict[str, dict[str, Any]] = {}

    def began(self, weights: Weights, run: str) -> None:
        """Take note of the weights that `init_from` found. run: its directory, absolute."""
        self.hub_id = self.init_from if is_on_hub(str(self.init_from)) else None
        if self._left_out is not None:
            self._left_out.begin(str(self.init_from), weights, run)

    def note_arguments(self, callbacks: Iterable[Callback]) -> None:
        """What the callbacks were told, before a checkpoint's state is restored."""
        self._given_arguments = {callback.state_key: arguments(callback) for callback in callbacks}

    def reapply_arguments(self, callbacks: Iterable[Callback]) -> None:
        """Let the callbacks do as they were told, whatever of it a checkpoint's state undid."""
        for callback in callbacks:
            then = self._saved_arguments.get(callback.state_key, {})
            reapply(callback, then, self._given_arguments[callback.state_key])
        self._saved_arguments = {}

    def strip(self, checkpoint: dict[str, Any]) -> None:
        if self._left_out is not None:
            checkpoint[STATE_DICT] = self._left_out.strip(checkpoint[STATE_DICT])

    def entry(self, trainer: Trainer, processor: Processor, trained: Trained, skipped: int) -> dict[str, Any]:
        """Everything that a policy needs beside the weights: dimensions, tokenizers, statistics, prompts, abilities.

        skipped: steps that were left out, as they were not finite.
        """
        lora, self._saved_at = self.blueprint.lora, max(time.time(), self._saved_at)
        return {
            "model": self.blueprint.config.to_dict(),
            "processor": processor.to_dict(),
            "sizes": sizes_of(datamodule_of(trainer).sources("train")),
            "lora": None if lora is None else asdict(lora),
            "base": self.blueprint.base,
            "adapter_base": self._left_out and self._left_out.to_dict(),
            "trained": asdict(trained),
            "saved_at": self._saved_at,
            "skipped_steps": skipped,
            "init_from": None if self.init_from is None else str(self.init_from),
            "hub_id": self.hub_id,
            "callbacks": self._given_arguments,
        }

    def complete(self, checkpoint: dict[str, Any], model: Pi05, path: Any, run: str) -> None:
        """Give the checkpoint what it leaves out; collective. Raises ValueError for one of another model.

        path: the checkpoint's, where it is known.  run: the directory of the run that goes on, absolute.
        """
        if "pi05" not in checkpoint:
            raise ValueError("the checkpoint is of something else: it has no `pi05` entry")
        saved = checkpoint["pi05"]
        if saved.get("adapter_base") is not None and self._left_out is not None:
            self._left_out.complete(checkpoint, model, path, self.init_from, run)
        tensors: dict[str, Tensor] = {k.removeprefix(PREFIX): value for k, value in checkpoint[STATE_DICT].items()}
        own, expected = self.blueprint, shapes_of(model.state_dict())
        check_model(saved, own.config, own.lora, own.base, shapes_of(tensors), expected)

    def resume(
        self,
        checkpoint: dict[str, Any],
        trainer: Trainer,
        recipe: Recipe,
        config: str | None,
        check_new: Callable[[], None],
    ) -> list[str]:
        """Prepare to go on: what is to be said that a run does otherwise than it was begun, or than it is told.

        config: today's, as YAML.  check_new: raises ValueError for what is wrong with the options of a new run.
        ValueError for what a resumed run cannot go on with.
        """
        saved = checkpoint["pi05"]
        self._saved_at = saved.get("saved_at", 0.0)
        check_resumable(checkpoint)
        self.hub_id = saved.get("hub_id")
        said = [check_steps(checkpoint["global_step"], trainer.max_steps, recipe.total_steps)]
        data = datamodule_of(trainer)
        said += check_data(saved["processor"], data.own_processor)
        sizes = sizes_of(data.sources("train"))  # an older checkpoint does not say how many there were
        said += [f"{difference}" for difference in size_differences(saved.get("sizes", sizes), sizes)]
        try:
            check_new()
        except ValueError as error:
            if not has_options(checkpoint.get("config"), config, "stages", "model.lora"):
                raise
            said.append(f"{error}")
        if not (self._left_out and self._left_out.is_at(self.init_from)):
            said.append(check_origin(self.init_from, saved))
        self._saved_arguments = saved.get("callbacks", {})
        checkpoint["callbacks"] = find_states(callbacks_of(trainer, Callback), checkpoint["callbacks"])
        return [message for message in said if message]


def check_ranks_opened_one(checkpoint: Mapping[str, Any]) -> None:
    """ValueError on all ranks where they opened different checkpoints; collective."""
    saved_at = checkpoint.get("pi05", {}).get("saved_at")
    found = of_all_ranks((checkpoint.get("global_step"), saved_at))
    if len(set(found)) > 1:
        steps = ", ".join(str(step) for step, _ in found)
        raise ValueError(
            f"the ranks opened different checkpoints (of the steps {steps}), as the run that was named saved another"
            " one meanwhile: name one file by --ckpt_path FILE"
        )
