"""What a resumed run of `pi05 fit` begins with, gathered from its ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from killable_fit import digest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from pi05_lightning.module import Pi05Module
from pi05_lightning.weights.sharded_checkpoint import AVERAGE, STATE_DICT, STATES, names_of

PARTS = STATE_DICT, AVERAGE, STATES


def whole(value: Any) -> Any:
    """Every tensor in memory of its own, whole on every rank."""
    if isinstance(value, Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def digests(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Of every bit of the parts that are sharded, by the names of parameters."""
    (optimizer,) = checkpoint[STATES]
    names = names_of(optimizer["param_groups"])
    state = {names[number]: values for number, values in optimizer["state"].items()}
    parts = {STATE_DICT: checkpoint[STATE_DICT], AVERAGE: checkpoint[AVERAGE], STATES: state}
    return {part: digest(dict(sorted(whole(values).items()))) for part, values in parts.items()}


class BeginsWith(Callback):
    """Writes the digests to begins-with-<step>.json."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        found = digests(
            {
                STATE_DICT: pl_module.state_dict(),
                AVERAGE: pl_module.average,
                STATES: [trainer.optimizers[0].state_dict()],
            }
        )
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, f"begins-with-{trainer.global_step}.json").write_text(json.dumps(found))
