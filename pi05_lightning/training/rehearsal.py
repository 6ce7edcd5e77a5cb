"""What would fail only later is tried before the first step: samples of everything that is drawn, a step per stage.

The data go the whole way, from the file to the device; the step is taken on the meta device, where no size of model
needs memory or time. Nothing of it changes training: no generator, no cache of draws, no count of bad samples.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.data.datamodule import Pi05DataModule, datamodule_of
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.samples import Samples
from pi05_lightning.losses import weighted_sums
from pi05_lightning.models.heads.base import Head, Terms
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.module import Pi05Module
from pi05_lightning.ranks import by_first_rank
from pi05_lightning.recipe import POSTTRAIN, PRETRAIN, Stage
from pi05_lightning.types import Batch, Modality, Sample, Subset

PATIENCE = 3.0  # seconds after which the user is told what takes so long
TORCH = Path(torch.__file__).parent
DEFAULT_LOSSES = {"pretrain": PRETRAIN.losses.used, "posttrain": POSTTRAIN.losses.used}

log = logging.getLogger(__name__)


def rehearse(trainer: Trainer, module: Pi05Module) -> dict[str, set[str]]:
    """Try what the stages that this run still reaches draw and train, and what it validates on.

    Returns, under DDP, of the stages in which every batch trains the same parameters, the names of these.
    Raises ValueError with the stage, the `source/modality`, the sample's address or the term, and the cause.
    """
    rehearsal = Rehearsal(trainer, module)
    if module.sharding is None:
        rehearsal.model = module.model
    by_first_rank(rehearsal.run)
    if trainer.strategy.broadcast(rehearsal.needs_weights):
        rehearsal.model = module.gathered(keep=trainer.is_global_zero)
        by_first_rank(rehearsal.run)
    return trainer.strategy.broadcast(rehearsal.reached)


class NeedsWeights(Exception):
    """A head looks at values, so that a model with weights has to be tried."""


class Rehearsal:
    """Of the stages from the trainer's step on.

    model: with the weights that are trained; None where they have to be gathered for it.
    needs_weights: there was none, and it was needed.
    reached: by the stage's name, see `rehearse`.
    """

    def __init__(self, trainer: Trainer, module: Pi05Module) -> None:
        self.trainer, self.module, self.data = trainer, module, datamodule_of(trainer)
        self.model: Pi05 | None = None
        self.needs_weights = False
        self.reached: dict[str, set[str]] = {}
        self._told = time.monotonic() + PATIENCE

    def run(self) -> None:
        with isolate_rng():
            read: dict[int, list[Sample]] = {}
            try:
                for stage in remaining(self.trainer, self.module):
                    self._rehearse(stage, read)
            except NeedsWeights:
                self.needs_weights = True
                return
            if self.trainer.enable_validation:
                validation = self.data.validation
                self.data.check_ranks([entry.size for entry in validation.entries])
                for number in range(len(validation.subsets)):
                    found = self._read(validation, number, validation.spread(number), "validation")
                    validation.collate(found)

    def _rehearse(self, stage: Stage, read: dict[int, list[Sample]]) -> None:
        """read: samples by the number of their entry, those of earlier stages included."""
        samples, entries = self.data.train_samples, self.data.drawn_entries(stage)
        check_fed(stage, self.module, self.data)
        for number in entries:
            if number not in read:
                telling = samples.spread(number) | samples.longest(number)
                read[number] = self._read(samples, number, telling, f"stage {stage.name}")
        learning = self._step(stage, [sample for number in entries for sample in read[number]])
        for number in entries:
            subset, entry = samples.subsets[number], samples.entries[number]
            terms = {t for t in stage.weights if entry.teaches(t, self.data.trained_by)}
            if not terms & learning:
                raise ValueError(
                    f"stage {stage.name}: nothing is learned from {subset}, as all that its losses"
                    f" ({', '.join(terms)}) would train is frozen, or has a learning rate of 0: draw none of it in this"
                    " stage's mixture, or change freeze and lr_factors"
                )
            if terms <= entry.lacking:
                log.warning(
                    "stage %s: some samples of %s have no subtask, and nothing is learned from these with its losses"
                    " (%s); a step that has no others ends the run. Draw %s in this stage's mixture instead",
                    stage.name,
                    subset,
                    ", ".join(sorted(terms)),
                    Subset(subset.source, Modality.HL_SUBTASK),
                )
        if isinstance(self.trainer.strategy, DDPStrategy) and all(samples.alike(number) for number in entries):
            reached = self._reached(stage, [read[number] for number in entries])
            if reached is not None:
                self.reached[stage.name] = reached

    def _read(self, samples: Samples, number: int, indices: Iterable[int], when: str) -> list[Sample]:
        """Samples of an entry."""
        found = []
        for index in sorted(indices):
            if time.monotonic() > self._told:
                rank_zero_info("before the first step, samples of all that will be drawn are tried …")
                self._told = float("inf")
            try:
                found.append(samples[number, index, index])
            except Exception as error:
                address = "" if isinstance(error, ValueError) else f" {samples.address(number, index)}:"
                raise ValueError(f"{when}, {samples.subsets[number]}:{address} {cause(error)}") from error
        return found

    def _step(self, stage: Stage, drawn: list[Sample]) -> set[str]:
        """Train on samples as the stage will, and forget it.

        The loss terms that reach something that learns, and those that the samples have nothing of.
        """
        try:
            terms = self._terms(stage, self._batch(drawn))
        except NeedsWeights:
            raise
        except Exception as error:
            raise ValueError(f"stage {stage.name}{self._culprit(stage, drawn)}: {cause(error)}") from error
        return {name for name, term in terms.items() if term.values.requires_grad} | (stage.weights.keys() - terms)

    def _culprit(self, stage: Stage, drawn: list[Sample]) -> str:
        """What of it alone fails too."""
        for subset in dict.fromkeys(sample.subset for sample in drawn):
            try:
                self._terms(stage, self._batch([sample for sample in drawn if sample.subset == subset]))
            except Exception:
                return f", {subset}"
        return ""

    def _batch(self, drawn: list[Sample]) -> Batch:
        """A batch as the training step gets it."""
        batch = self.module.with_noise(self.data.train_samples.collate(drawn))
        batch = self.trainer.precision_plugin.convert_input(batch)
        moved = self.module.transfer_batch_to_device(batch, self.module.device, 0)
        moved = self.data.on_after_batch_transfer(moved, 0)
        assert isinstance(moved, Batch)
        return moved

    def _terms(self, stage: Stage, batch: Batch) -> Terms:
        """The loss terms of a batch, after a backward pass from those that have something to learn."""
        try:
            return step(self._blank(stage), batch.to("meta"), stage, self.module.knowledge_insulation)
        except Exception as error:
            # a head may look at values, of which there are none there; then the true model says whether it fails
            log.debug("stage %s on the meta device: %s", stage.name, error)
            return self._true_terms(stage, batch)

    def _blank(self, stage: Stage) -> Pi05:
        """A model without memory, of the types that training computes with, frozen as in a stage."""
        model = self.module.blueprint.blank(stage)
        compute = self.module.sharding and self.module.sharding.compute
        for trained, part in zip(self.module.model.parameters(), model.parameters(), strict=True):
            part.data = part.data.to(compute or trained.dtype)
        return model

    def _reached(self, stage: Stage, drawn: list[list[Sample]]) -> set[str] | None:
        """The parameters that get a gradient from each of some lists of samples; None where that hangs on which."""
        if any(not stage.weights.keys().isdisjoint(head.terms) for head in self._auxiliary):
            return None  # whether it has targets is its own business
        model, found = self._blank(stage), []
        for samples in drawn:
            step(model, self._batch(samples).to("meta"), stage, self.module.knowledge_insulation)
            found.append({name for name, own in model.named_parameters() if own.grad is not None})
            model.zero_grad()
        return found[0] if all(names == found[0] for names in found) else None

    @property
    def _auxiliary(self) -> list[Head]:
        model = self.module.model
        return [head for name, head in model.heads.items() if name in model.auxiliary]

    def _true_terms(self, stage: Stage, batch: Batch) -> Terms:
        """With the weights and on the device that are trained, which it leaves as they are."""
        if self.model is None:
            raise NeedsWeights
        model = self.model
        tensors: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for name, parameter in model.named_parameters():
            tensors[name] = parameter.detach().requires_grad_(not stage.freezes(name))

        def call(*args: object, **options: object) -> Terms:
            return functional_call(model, tensors, args, options)

        # what is compiled runs as it is where a mode watches, see `compile_blocks`
        with self.trainer.precision_plugin.train_step_context(), FlopCounterMode(display=False):
            return step(call, batch, stage, self.module.knowledge_insulation)


def step(model: Pi05 | Callable[..., Terms], batch: Batch, stage: Stage, insulate: bool) -> Terms:
    """A training step's forward and backward pass on one rank, without an optimizer: the loss terms."""
    terms = model(batch, stage.weights, insulate=insulate)
    learning = [value for value in weighted_sums(terms, stage.weights) if value.requires_grad]
    if learning:
        torch.stack(learning).sum().backward()
    return terms


def remaining(trainer: Trainer, module: Pi05Module) -> Iterable[Stage]:
    """The stages of the steps from the trainer's own on, up to its last."""
    first = trainer.global_step
    return [stage for stage, _ in module.recipe.between(first, max(trainer.max_steps, first + 1))]


def check_fed(stage: Stage, module: Pi05Module, data: Pi05DataModule) -> None:
    """Say which losses of a stage nothing that it draws can train.

    Raises ValueError where that cannot be meant: the weight is not the default one, or the head's own parameters would
    stay as they are.
    """
    fed, drawn, default = data.fed(stage), data.drawn(stage), DEFAULT_LOSSES.get(stage.name, POSTTRAIN.losses.used)
    own = {term for head in module.model.heads.values() if list(head.parameters()) for term in head.terms}
    for term, weight in stage.losses.used.items():
        if term not in stage.weights or term in fed:
            continue
        modalities = set(data.trained_by[term])
        problem = (
            f"stage {stage.name}: the loss {term!r} has a weight of {weight:g}, and nothing that the stage draws"
            f" ({', '.join(sorted(drawn))}) has anything to do with it: it learns from {', '.join(sorted(modalities))}"
        )
        if without := sorted(modalities & drawn):
            problem += f", but of {', '.join(without)} only where there is a subtask"
        elif Modality.FAST in modalities and data.processor.fast is None:
            problem += " (which needs a FAST tokenizer: data.fast)"
        remedy = "draw such samples in this stage's mixture, or give the loss a weight of 0"
        if term in own or weight != default.get(term):
            raise ValueError(f"{problem}. {remedy[0].upper()}{remedy[1:]}")
        log.warning("%s, so it is left out. To say so: %s", problem, remedy)


def cause(error: Exception) -> str:
    """What an error says, with its kind and its place in the code where it is not one of ours."""
    if isinstance(error, BadSample) or type(error) is ValueError:
        return str(error)
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if TORCH not in Path(frame.filename).parents]
    where = f" ({places[-1].filename}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {error}{where}"
