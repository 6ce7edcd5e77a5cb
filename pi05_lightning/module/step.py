"""What is kept of an optimizer step until it is taken: what its batches lost, and the scalars that are logged of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pi05_lightning.losses import nothing_to_learn
from pi05_lightning.recipe import Stage


class StepLosses:
    """The losses of the batches that a step accumulates, on their device: the host waits where it logs alone."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        """By the name that they are logged under, one value per batch."""
        self._counts: dict[str, Tensor] = {}
        """The elements of each term in all of the step's batches, on all ranks."""

    def saw(self, stage: Stage, means: Mapping[str, Tensor], counts: dict[str, Tensor], total: Tensor) -> None:
        """Take note of a batch: what `mean_terms` gives of it, and the loss."""
        for name, value in ({f"{stage.name}/{term}": mean for term, mean in means.items()} | {"total": total}).items():
            self._values.setdefault(f"loss/{name}", []).append(value.detach())
        self._counts = counts

    def scalars(self, stage: Stage, norms: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
        """Losses, and norms of gradients, by the names that they are logged under; waits for the device once.

        A term that had no element in the step is left out. Raises ValueError where none had.
        """
        values = {name: torch.stack(found).mean() for name, found in self._values.items()}
        values |= {f"grad_norm/{part}": norm for part, norm in norms.items()}
        values |= self._counts
        numbers = torch.stack([value.to(device, torch.float32) for value in values.values()])
        scalars = dict(zip(values, numbers.tolist(), strict=True))
        counts = {term: scalars.pop(term) for term in self._counts}
        if not any(counts.values()):
            raise nothing_to_learn(stage.weights)
        for term in [term for term, count in counts.items() if not count]:
            del scalars[f"loss/{stage.name}/{term}"]
        return scalars
