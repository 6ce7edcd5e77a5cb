"""Steps whose losses or gradients are not finite: none reaches the weights, and no such weights are saved."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pi05_lightning.losses import nothing_to_learn
from pi05_lightning.models.shards import own_part
from pi05_lightning.module.gradient_norms import gradient_norms
from pi05_lightning.module.step import NOTHING, StepLosses
from pi05_lightning.recipe import Stage
from pi05_lightning.types import Drawn

log = logging.getLogger(__name__)

LOSS, GRADIENT, TOTAL = "the loss ", "the gradient norm of ", "total"


class StepNotFinite(ValueError):
    """Training stops, since losses, gradients or weights are not finite.

    intact: the state is the one from before the step, so it can be saved and gone on from.
    """

    def __init__(self, message: str, intact: bool) -> None:
        super().__init__(message)
        self.intact = intact


@dataclass
class Step:
    """What the losses and gradients of a step came to.

    names: of each of `values`, what it is, and which of the step's batches it is of, None for all.  drawn: of each
    batch.  copied: when the values are on the host.
    """

    number: int
    stage: Stage
    names: list[tuple[str, int | None]]
    values: Tensor
    drawn: list[Drawn]
    copied: torch.cuda.Event | None

    def problem(self) -> str:
        """Which losses are not finite, or which gradients where all losses are, in words; empty where nothing is.

        Raises ValueError for a step that has nothing to learn, as one rank does before it.
        """
        if any(name == NOTHING for name, _, _ in self._bad):
            raise nothing_to_learn(self.stage.weights)
        bad = {name: value for name, _, value in self._bad if name.startswith(LOSS)} or {
            name: value for name, _, value in self._bad
        }
        named = {name: value for name, value in bad.items() if not name.endswith(TOTAL)} or bad
        return ", ".join(f"{name} is {value}" for name, value in named.items())

    def suspects(self) -> list[Drawn]:
        """The batches that have a loss which is not finite; all of the step's where only gradients are not."""
        bad = {batch for _, batch, _ in self._bad}
        return [drawn for number, drawn in enumerate(self.drawn) if number in bad] or self.drawn

    @property
    def _bad(self) -> list[tuple[str, int | None, float]]:
        named = zip(self.names, self.values.tolist(), strict=True)
        return [(*name, value) for name, value in named if not math.isfinite(value)]


class FiniteSteps:
    """Looks at every optimizer step before it is taken, and stops training or leaves the step out.

    Ranks decide alike, since losses and gradients are means over all of them. On a GPU a fused optimizer is told on the
    device to leave the step out, and the host looks one step later, so that it never waits; for other optimizers it
    waits. Gradients of fp16 are left to its scaler, which leaves out steps that overflow.

    max_skipped: steps that are left out before training stops; 0 stops at the first.
    addresses: of the samples that a batch was made of.
    """

    def __init__(self, max_skipped: int, addresses: Callable[[Drawn], list[str]]) -> None:
        if not max_skipped >= 0:
            raise ValueError(f"model.max_skipped_steps is {max_skipped}: it must be 0, to stop at the first, or more")
        self.max_skipped, self.addresses = max_skipped, addresses
        self.skipped = 0
        self._unseen: Step | None = None

    def begin(self) -> None:
        """Forget what training that was broken off had seen."""
        self._unseen = None

    def before_step(
        self,
        number: int,
        stage: Stage,
        losses: StepLosses,
        model: nn.Module,
        optimizer: Optimizer,
        scaled: bool = False,
    ) -> dict[str, Tensor]:
        """Whether the step may be taken; the gradient norms of the model's parts, on the device.

        scaled: a gradient scaler watches the gradients, which are not looked at.  Raises StepNotFinite, and ValueError
        for a step without anything to learn.
        """
        self.look(model)
        norms = gradient_norms(model.named_parameters())
        lost = losses.terms | {TOTAL: losses.totals}
        found: dict[tuple[str, int | None], Tensor] = {
            (f"{LOSS}{name}", batch): value for name, values in lost.items() for batch, value in enumerate(values)
        }
        found |= {(name, None): value for name, value in losses.nothing().items()}
        if not scaled:
            found |= {(f"{GRADIENT}{part}", None): norm for part, norm in norms.items()}
        device = norms[TOTAL].device if TOTAL in norms else None  # the host's, where it is offloaded
        values = torch.stack([value.to(device, torch.float32) for value in found.values()])
        step = Step(number, stage, [*found], values, losses.drawn, None)
        if values.is_cuda and (scaled or optimizer.defaults.get("fused")):
            if not scaled:  # as a gradient scaler tells it
                optimizer.found_inf = values.isfinite().logical_not().any().float()  # type: ignore[attr-defined]
            step.values, step.copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
            step.copied.record()
            self._unseen = step
        elif problem := step.problem():
            self._decide(step, problem, model, intact=True)
            optimizer.zero_grad()  # without gradients optimizers leave parameters and their own state alone
        return norms

    def look(self, model: nn.Module) -> None:
        """Look at what the host has not seen yet. Raises as `before_step`."""
        step, self._unseen = self._unseen, None
        if step is None:
            return
        assert step.copied is not None
        step.copied.synchronize()
        if problem := step.problem():
            self._decide(step, problem, model, intact=False)

    def _decide(self, step: Step, problem: str, model: nn.Module, intact: bool) -> None:
        what = f"step {step.number} (stage {step.stage.name}): {problem}"
        samples = "; ".join(dict.fromkeys(address for drawn in step.suspects() for address in self.addresses(drawn)))
        if self.skipped < self.max_skipped:
            self.skipped += 1
            log.warning("%s. Skipped, as %d of %d may be. Samples: %s", what, self.skipped, self.max_skipped, samples)
            return
        earlier = not_finite(model.named_parameters())
        cause = (
            f" The weights were not before it ({some(earlier)}): the steps before were too large." if earlier else ""
        )
        raise StepNotFinite(
            f"{what}. The step was not taken.{cause} Lower the learning rate, clip gradients"
            " (trainer.gradient_clip_val), mend the data, or have such steps skipped with model.max_skipped_steps (now"
            f" {self.max_skipped}). Samples: {samples}",
            intact=intact and not earlier,
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those with values that are not finite; waits for the device.

    Where ranks divide them between them, every rank must ask, and all are told the same.
    """
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return []
    bad = torch.stack([_has_bad_value(own_part(tensor)) for _, tensor in floating])
    if any(isinstance(tensor, DTensor) for _, tensor in floating):
        found = bad.byte()
        dist.all_reduce(found, dist.ReduceOp.MAX)
        bad = found.bool()
    return [name for (name, _), is_bad in zip(floating, bad.tolist(), strict=True) if is_bad]


def _has_bad_value(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    # nan is both the least and the largest; `isfinite` of all takes more memory than a large tensor itself
    return torch.stack(tensor.aminmax()).isfinite().all().logical_not()


def check_savable(weights: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raises StepNotFinite for weights, by name, that are to be saved after so many steps and are not finite."""
    if bad := not_finite(weights):
        raise StepNotFinite(
            f"after step {step - 1} the weights are not finite, and are not saved ({some(bad)}): lower the learning"
            " rate, and go on from an earlier checkpoint",
            intact=False,
        )


def some(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
