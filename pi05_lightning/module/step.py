"""What is kept of an optimizer step until it is taken: what its batches lost, and the scalars that are logged of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pi05_lightning.recipe import Stage
from pi05_lightning.types import Drawn

NOTHING = "nothing to learn"


class StepLosses:
    """The losses of the batches that a step accumulates, on their device: the host waits where it logs alone.

    terms: by name, of each batch.  totals: their weighted sum.  drawn: what the batches were made of.
    """

    def __init__(self) -> None:
        self.terms: dict[str, list[Tensor]] = {}
        self.totals: list[Tensor] = []
        self.drawn: list[Drawn] = []
        self._counts: dict[str, Tensor] = {}
        """The elements of each term in all of the step's batches, on all ranks."""

    def saw(self, means: Mapping[str, Tensor], counts: dict[str, Tensor], total: Tensor, drawn: Drawn) -> None:
        """Take note of a batch: what `mean_terms` gives of it, and the loss."""
        for term, value in means.items():
            self.terms.setdefault(term, []).append(value.detach())
        self.totals.append(total.detach())
        self.drawn.append(drawn)
        self._counts = counts

    def nothing(self) -> dict[str, Tensor]:
        """Infinite where no term had an element in the step, on any rank, and 0 elsewhere; on their device."""
        if not self._counts:
            return {}
        total = torch.stack(list(self._counts.values())).sum()
        return {NOTHING: torch.where(total > 0, 0.0, torch.inf)}

    def scalars(self, stage: Stage, norms: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
        """Losses, and norms of gradients, by the names that they are logged under; waits for the device once.

        A term that had no element in the step is left out.
        """
        values = {f"loss/{stage.name}/{term}": torch.stack(found).mean() for term, found in self.terms.items()}
        values["loss/total"] = torch.stack(self.totals).mean()
        values |= {f"grad_norm/{part}": norm for part, norm in norms.items()}
        values |= self._counts
        numbers = torch.stack([value.to(device, torch.float32) for value in values.values()])
        scalars = dict(zip(values, numbers.tolist(), strict=True))
        for term in [term for term in self._counts if not scalars.pop(term)]:
            del scalars[f"loss/{stage.name}/{term}"]
        return scalars
