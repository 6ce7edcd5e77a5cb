"""What the checkpoints of a run that trains adapters leave out: the base, which is on disk already."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pi05_lightning.models.parallelize import Lora
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.ranks import by_first_rank, is_first_rank
from pi05_lightning.weights.adapter_base import AdapterBase, place_of
from pi05_lightning.weights.adapters import fill_base, fill_base_slices
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.locate import locate, run_of
from pi05_lightning.weights.sharded_checkpoint import PREFIX, STATE_DICT
from pi05_lightning.weights.training_checkpoint import ONLY_TRAINED, TrainingCheckpoint

log = logging.getLogger(__name__)


class LeftOut:
    """The base that a run's adapters were put into; nothing is left out while there is none.

    Names of tensors are those of the LightningModule.
    """

    def __init__(self, lora: Lora) -> None:
        self.base: AdapterBase | None = None
        self._frozen = lora.frozen
        self._own: set[str] = set()
        """Frozen parameters that are not the base's, as they were trained before."""

    def begin(self, name: str, weights: Weights, run: str) -> None:
        """Leave out weights that were found by a name, and read in the default type; collective.

        run: its directory, absolute.  Warns of a checkpoint of a run, which may remove it.
        """
        dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        self.base = AdapterBase(by_first_rank(weights.content_hash), place_of(name, weights), run, dtype)
        if isinstance(weights, TrainingCheckpoint) and is_first_rank():
            log.warning(
                "the checkpoints of this run leave out their base, %s, and cannot be opened without it: its run removes"
                " it as it saves later ones. Keep it, or begin with a folder that `pi05 convert` made of it",
                self.base.place,
            )

    def to_dict(self) -> dict[str, Any] | None:
        """What a checkpoint says of the base; `complete` reads it."""
        return None if self.base is None else asdict(self.base)

    def is_at(self, name: str | None) -> bool:
        """Whether the base was found where a name says."""
        return self.base is not None and self.base.is_at(name)

    def strip(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps of a module's tensors."""
        return {name: tensor for name, tensor in tensors.items() if self.base is None or not self._is_of_base(name)}

    def complete(
        self, checkpoint: dict[str, Any], model: Pi05, path: str | Path | None, given: str | None, run: str
    ) -> None:
        """Give a model the base that a checkpoint leaves out, and the checkpoint what the model has then; collective.

        path: the checkpoint's, where it is known.  given: where a user says that the base is.  run: the directory of
        the run that goes on, absolute.  ValueError where the base is not found.
        """
        saved = AdapterBase(**checkpoint["pi05"]["adapter_base"])
        written_in = Path(saved.run) if path is None else run_of(Path(path))
        found = by_first_rank(lambda: saved.find(saved.places(written_in, given), locate)[0])
        weights, dtype = locate(found.place), getattr(torch, saved.dtype)
        own = [name.removeprefix(PREFIX) for name in checkpoint[STATE_DICT]]
        if isinstance(model, FSDPModule):
            filled = fill_base_slices(model, weights, dtype, own)
        else:
            filled = fill_base(model, partial(weights.tensors, dtype), own)
        tensors = model.state_dict()
        checkpoint[STATE_DICT] = {PREFIX + name: tensors[name] for name in filled} | checkpoint[STATE_DICT]
        self._own = {name for name in own if self._is_of_base(name)}
        self.base = replace(found, run=run)

    def _is_of_base(self, name: str) -> bool:
        name = name.removeprefix(PREFIX)
        return not name.startswith(ONLY_TRAINED) and name not in self._own and bool(re.search(self._frozen, name))
