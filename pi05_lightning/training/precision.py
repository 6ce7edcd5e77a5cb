"""Pure bf16, and bf16 over fp32 weights, for Lightning; fp32 (`32-true`) is Lightning's own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer


def check_precision(plugin: Precision) -> None:
    """ValueError for weights in 64 bits, and in 16 whose gradients nothing scales."""
    if type(plugin) is DoublePrecision or (type(plugin) is HalfPrecision and plugin.precision == "16-true"):
        raise ValueError(
            f"trainer.precision {plugin.precision} is not trained in: use 32-true, bf16-mixed or bf16-true, or on a GPU"
            " 16-mixed"
        )


def replaced(plugin: Precision) -> Precision:
    """What `Pi05Module` trains with in the place of Lightning's plugin; the plugin itself where that is right.

    Raises ValueError where `check_precision` does.
    """
    check_precision(plugin)
    if type(plugin) is HalfPrecision:
        return PureHalf(plugin.precision)
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return Unscaled("bf16-mixed", plugin.device)
    return plugin


def check_scaled(trainer: Trainer) -> None:
    """ValueError where gradients of fp16 are to be clipped before a fused optimizer, which scales them back itself."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    is_clipped = trainer.gradient_clip_val and trainer.precision_plugin.precision == "16-mixed"
    if is_clipped and any(group.get("fused") for group in groups):
        raise ValueError(
            "trainer.precision 16-mixed scales the gradients, and a fused optimizer, as the default one, gives no one"
            " the true ones to clip: name one with `fused: false`, such as torch.optim.AdamW, or use bf16-mixed"
        )


class PureHalf(HalfPrecision):
    """Weights, gradients and optimizer state in 16 bits; data as they are, so that targets are not rounded.

    Lightning's own also casts the actions of a batch, to 8 bits of precision, before noise is added to them. The model
    casts where it computes.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Generator[None]:
        yield


class Unscaled(MixedPrecision):
    """Autocast to bf16, whose gradients nothing scales, so that they can be clipped for every optimizer.

    Lightning's own refuses to for fused ones, which would unscale the gradients of fp16 only after they were clipped.
    """

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


class CastByShard(Unscaled):
    """bf16 over fp32 weights without autocast: FSDP casts each group of weights as it gathers them."""

    @contextmanager
    def forward_context(self) -> Generator[None]:
        yield
