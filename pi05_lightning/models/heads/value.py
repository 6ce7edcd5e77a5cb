"""The value head: how an episode will end, and when, as a distribution over bins (π*0.6, arXiv 2511.14759, §IV-A).

V is the expected return: 0 at success, -1 at failure or as far from success as the longest episode of the task. The
target is the bin of the return, as in the paper, and V the expectation over the bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone, initialize
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import Head, Term, Terms
from pi05_lightning.types import Batch, Frame, Modality, Prefix

NAME = "value"
ACTIONS = frozenset({Modality.CONTINUOUS})


class Returns:
    """The return of each frame that knows its own. In a batch: row i64[N], return f32[N] in [-1, 0]."""

    def make(self, frame: Frame) -> float | None:
        return frame.returns

    def images(self, target: float) -> set[str]:
        return set()

    def collate(
        self,
        targets: Sequence[float | None],
        images: Sequence[Mapping[str, int]],
        encode: Callable[[str], list[int]],
    ) -> dict[str, Tensor]:
        known = [(row, target) for row, target in enumerate(targets) if target is not None]
        return {
            "row": torch.tensor([row for row, _ in known], dtype=torch.long),
            "return": torch.tensor([target for _, target in known], dtype=torch.float32),
        }


class ValueHead(Head):
    """Loss term `value`: cross-entropy of the return's bin, from the hidden state of the prompt's last token.

    What follows the prompt it does not see: the policy's words, and the actions themselves as FAST tokens.

    bins: of which the first is -1 and the last 0.
    """

    terms: ClassVar = {NAME: ACTIONS}
    metrics: ClassVar = {"value_error": ACTIONS}
    reads_hidden = True
    target_maker = Returns()

    def __init__(self, config: ModelConfig, bins: int = 201) -> None:
        super().__init__()
        self.bins = bins
        self.hidden = nn.Linear(config.language.width, config.language.width)
        self.out = nn.Linear(config.language.width, bins)

    def bin_of(self, returns: Tensor) -> Tensor:
        """The nearest bin, i64[N], of returns f32[N]."""
        return ((returns + 1) * (self.bins - 1)).round().long().clamp(0, self.bins - 1)

    def logits(self, batch: Batch, prefix: Prefix, row: Tensor) -> Tensor:
        """f32[N bins] of the batch's rows i64[N]."""
        assert prefix.hidden is not None
        last = (batch.token_mask & ~batch.causal)[row].sum(1) - 1
        return self.out(F.silu(self.hidden(prefix.hidden[row, last]))).float()

    def expected(self, logits: Tensor) -> Tensor:
        """V, f32[N] in [-1, 0]."""
        values = torch.linspace(-1, 0, self.bins, device=logits.device)
        mean = (logits.softmax(-1) * values).sum(-1)  # no product of matrices: autocast would round V to whole bins
        return mean.clamp(-1, 0)  # probabilities that add up to a little more than 1 would make a failure a gain

    def value(self, batch: Batch, prefix: Prefix) -> Tensor:
        """V of every row of a batch, f32[B]."""
        return self.expected(self.logits(batch, prefix, torch.arange(len(batch), device=batch.tokens.device)))

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        return {NAME: torch.ones_like(batch.auxiliary[NAME]["row"], dtype=torch.bool)}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        known = batch.auxiliary[NAME]
        logits = self.logits(batch, prefix, known["row"])
        return {NAME: F.cross_entropy(logits, self.bin_of(known["return"]), reduction="none")}

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        known = batch.auxiliary[NAME]
        error = (self.expected(self.logits(batch, prefix, known["row"])) - known["return"]).abs()
        return {"value_error": Term(error, torch.ones_like(error, dtype=torch.bool))}

    def reset_parameters(self) -> None:
        initialize(self)
