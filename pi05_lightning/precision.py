"""Pure bf16 for Lightning. fp32 (`32-true`) and bf16 over fp32 weights (`bf16-mixed`) are Lightning's own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.plugins import HalfPrecision


class PureHalf(HalfPrecision):
    """Weights, gradients and optimizer state in 16 bits; data as they are, so that targets are not rounded.

    `Pi05Module` puts it in the place of Lightning's own, which also casts the actions of a batch, to 8 bits of
    precision, before noise is added to them. The model casts where it computes.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Generator[None]:
        yield
