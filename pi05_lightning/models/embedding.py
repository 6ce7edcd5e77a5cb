"""An embedding whose values wait for the weights."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing on the meta device: torch imports its compiler for that, a second or more."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
