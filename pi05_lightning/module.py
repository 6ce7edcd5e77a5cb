"""The LightningModule: glue between the model, the recipe, the optimizer and the logs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pi05_lightning.acting import Acting
from pi05_lightning.data.clock import check_clock
from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.data.differences import check_measurable, differences
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.samples import Observed
from pi05_lightning.evaluation.metrics import Evaluator, Measured, SubsetMetrics, compute_all, metric_names
from pi05_lightning.files.ranges import check
from pi05_lightning.finite import TOTAL, FiniteSteps, check_savable
from pi05_lightning.inference import Inference
from pi05_lightning.losses import draw_noise, mean_terms, nothing_to_learn, total_loss
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import HeadFactory
from pi05_lightning.models.parallelize import (
    Lora,
    Sharding,
    add_adapters,
    begin_sharded,
    checkpoint_blocks,
    compile_blocks,
    gather,
    quantize_base,
    reset_adapters,
    shard,
)
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind
from pi05_lightning.optim import StageSchedule, check_optimizer, param_groups, resumable
from pi05_lightning.recipe import Recipe, Stage
from pi05_lightning.types import Batch, Subset
from pi05_lightning.weights.abilities import ADVANTAGE, Trained, trained
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.beginning import begin, begin_slices, carried_on
from pi05_lightning.weights.left_out import LeftOut
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.resumed import (
    arguments,
    check_data,
    check_model,
    check_origin,
    check_steps,
    check_whole,
    find_states,
    has_options,
    reapply,
)
from pi05_lightning.weights.safetensors import shapes_of
from pi05_lightning.weights.sharded_checkpoint import AVERAGE, PREFIX, STATE_DICT

log = logging.getLogger(__name__)


@dataclass
class Predicted:
    """What a policy would do at each frame of a batch.

    actions: f32[B T A] in the robot's units, absolute.  subtasks: what it said it would do, which conditioned the
    actions; None where the task alone did.
    """

    actions: np.ndarray
    subtasks: list[str | None]


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01, fused=True)


class Pi05Module(LightningModule):
    """π0.5 under training: backbone, subtask head, FAST head and flow head.

    What a step trains is the recipe's business (`StageSwitch`); without one, it is the posttrain stage throughout.

    The weights come, in this order, from 1. the checkpoint that is resumed, 2. `init_from`, 3. random initialisation.

    Args:
        config: the model's dimensions; by default those of `init_from`.
        init_from: weights to begin with: a checkpoint, a run or a folder of ours, LeRobot's or openpi's folder, or the
            Hub id of a folder.
        heads: auxiliary heads of your own by name, each a subclass of `Head` by its import path (docs/add-a-loss.md).
            They are trained beside the others; policies and exports leave them out.
        lora: train adapters beside the linear layers instead of the layers.
        base: keep the layers beside adapters, which are frozen, in 4 bits (nf4) or 8 bits (int8) a value; needs `lora`.
        activation_checkpointing: keep only the input of every block and run it again in the backward pass.
        compile: compile every block for training steps: on a GPU half as fast again, after a minute.
        optimizer: makes the optimizer from parameter groups; groups and their schedule come from the recipe.
        flow_draws: noise draws per observation and step; they share one backbone pass.
        rtc_max_delay: training-time real-time chunking: the first 0 to this many actions of a draw are given, not
            predicted, so that at inference a chunk can go on from actions that are being executed.
        knowledge_insulation: the flow loss gives the backbone no gradient.
        num_steps: Euler steps when validation samples actions.
        accuracy_threshold: largest error of an action value that validation counts as right, as a share of the
            normalised range.
        seed: of noise and flow time; each sample's draw depends on this and its key alone.
        max_skipped_steps: steps whose losses or gradients are not finite that are left out, over the whole run, before
            training stops; 0: it stops at the first, before that reaches the weights.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        init_from: str | None = None,
        heads: dict[str, HeadFactory] | None = None,
        lora: Lora | None = None,
        base: Kind | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        flow_draws: int = 1,
        rtc_max_delay: int = 0,
        knowledge_insulation: bool = False,
        num_steps: int = 10,
        accuracy_threshold: float = 0.1,
        seed: int = 0,
        max_skipped_steps: int = 0,
    ) -> None:
        super().__init__()
        if config is None and init_from is None:
            raise ValueError("a model needs its dimensions: give model.config, or model.init_from")
        self.config = config or locate(str(init_from)).config()
        if base is not None and lora is None:
            raise ValueError(
                f"model.base {base} is how layers are kept that adapters are trained beside, and there are none: add"
                " model.lora (--model.lora.rank 16), or leave model.base out"
            )
        self.init_from, self.lora, self.base, self.make_optimizer = init_from, lora, base, optimizer
        self.activation_checkpointing, self.compile_model = activation_checkpointing, compile
        check_optimizer(optimizer)
        for name, value in {"flow_draws": flow_draws, "num_steps": num_steps}.items():
            check(f"model.{name}", value, 1)
        check("model.accuracy_threshold", accuracy_threshold, 0, above=True)
        if not 0 <= rtc_max_delay < self.config.horizon:
            raise ValueError(f"rtc_max_delay {rtc_max_delay} is not within 0 and the horizon of {self.config.horizon}")
        self.flow_draws, self.rtc_max_delay = flow_draws, rtc_max_delay
        self.knowledge_insulation = knowledge_insulation
        self.num_steps, self.accuracy_threshold, self.seed = num_steps, accuracy_threshold, seed
        self.processor: Processor | None = None
        self.metrics: dict[Subset, SubsetMetrics] = {}
        self.results: dict[str, dict[str, float]] = {}
        self.head_factories = heads
        with torch.device("meta"):
            self.model = Pi05(self.config, heads)
        self.follow(Recipe.of(pretrain_steps=0))
        self.will_be_restored = False
        """A checkpoint's weights follow: `configure_model` makes none that would be thrown away."""
        self._trained, self._trained_at = Trained(complete=True), 0
        """What the weights were trained on before this step."""
        self.acting = Acting()
        """How a prediction acts."""
        self._trained_with: Processor | None = None
        """What made the samples that the weights were trained on; None where nothing was trained or loaded yet."""
        self._given_arguments: dict[str, dict[str, Any]] = {}
        """Of the trainer's callbacks, before a checkpoint's state, see `reapply`."""
        self._saved_arguments: dict[str, dict[str, Any]] = {}
        self._policies: dict[str, Inference] = {}
        self.average: dict[str, Tensor] = {}
        """Of the weights, by name, if they are averaged."""
        self.run_config: str | None = None
        """The configuration of the run, as YAML, if it has one."""
        self.sharding: Sharding | None = None
        """How the model is divided between the ranks, if it is; the strategy fsdp2 says so."""
        self._whole: list[Pi05] = []
        """The gathered model, while there is one; in a list, as it is no part of this module."""
        self._configured = False
        self._left_out = None if lora is None else LeftOut(lora)
        """What checkpoints leave out: the weights that adapters were put into, if they are on disk."""
        self._hollow = False
        """Its parameters have memory, and nothing in it: a checkpoint's weights have yet to come."""
        self._losses: dict[str, list[Tensor]] = {}
        """Of the step under way, one value per accumulated batch."""
        self._step_counts: dict[str, Tensor] = {}
        """Of the step under way, the elements of each term on all ranks."""
        self.finite = FiniteSteps(max_skipped_steps, lambda drawn: datamodule_of(self.trainer).addresses(drawn))

    # --- building

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        divides = isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
        if divides and self.base is not None:
            raise ValueError(
                f"model.base {self.base} is not sharded (trainer.strategy {type(strategy).__name__}), as FSDP2 divides"
                " floating-point weights alone: leave model.base out, or give trainer.strategy ddp, with which each"
                " rank has the quantised base whole"
            )
        if not divides:
            self.sharding = None
        elif self.sharding is None:
            raise ValueError(
                f"trainer.strategy {type(strategy).__name__} shards the weights in a way that this model, its stages'"
                " freezing and its averaged weights do not support: use fsdp2, which divides them between the ranks too"
            )
        if stage == "fit":
            check_clock(self.trainer)
        data = datamodule_of(self.trainer)
        data.measure_with(None if stage == "fit" else self._trained_with)
        self.processor = data.processor
        self._given_arguments = {c.state_key: arguments(c) for c in self._callbacks}

    @property
    def _callbacks(self) -> list[Callback]:
        return cast("Any", self.trainer).callbacks  # Lightning sets them without declaring them

    def follow(self, recipe: Recipe) -> None:
        """Train by a recipe; what LoRA leaves alone is frozen in all of its stages.

        Raises ValueError for losses that no head of the model has.
        """
        recipe.check_terms(self.model.terms)
        self.recipe = recipe if self.lora is None else recipe.freezing(self.lora.frozen)

    def check_new(self) -> None:
        """Before a new run: ValueError for patterns that no parameter matches, and warm-ups longer than their stage.

        A run that is resumed with the options it was begun with goes on, and is told of them.
        """
        names = [name for name, _ in (self.model if self.lora is None else self.blank()).named_parameters()]
        self.recipe.check_followed(names)
        if self.lora is not None:
            self.lora.check_patterns(names)

    def configure_model(self) -> None:
        """Give the parameters memory and values, then add what the options ask for; once."""
        if self._configured:
            self._check_sharding()
            return
        self._configured = True
        blank = self.model.device.type == "meta"
        weights = locate(self.init_from) if self.init_from and blank and not self.will_be_restored else None
        if self.sharding is not None:
            self._make_shards(self.sharding, weights)
        else:
            self._make(weights)
        if weights is not None:
            self._trained = carried_on(weights, self.processor)
            if self._left_out is not None:
                self._left_out.begin(str(self.init_from), weights, self._run_directory)
        if self.compile_model:
            compile_blocks(self.model)
        if self.activation_checkpointing:
            checkpoint_blocks(self.model)

    def _make(self, weights: Weights | None) -> None:
        blank = self.model.device.type == "meta"
        if blank:
            self.model.to(torch.get_default_dtype())  # bf16 under pure bf16, so that no fp32 copy is ever made
            if self.lora is not None and self.base is not None:
                quantize_base(self.model, self.base, self.lora)
            if not self.will_be_restored:
                begin(self.model, weights, self.processor)
        if self.lora is not None:
            add_adapters(self.model, self.lora)
        if blank and self.will_be_restored:
            self.model.to_empty(device=torch.get_default_device())
            self._hollow = True

    def _make_shards(self, sharding: Sharding, weights: Weights | None) -> None:
        """As `_make`, so that no rank ever has more than its part, and one layer of the others'."""
        if self.model.device.type != "meta":
            raise ValueError("a model that has weights already cannot be divided between ranks: make a new Pi05Module")
        self.model.to(torch.get_default_dtype())
        if self.lora is not None:
            add_adapters(self.model, self.lora)
        shard(self.model, sharding)
        self.model.to_empty(device=torch.get_default_device())
        if self.will_be_restored:
            self._hollow = True
        else:
            self._agree_on_chance()
            begin_slices(self.model, weights, self.processor)
            if self.lora is not None:
                reset_adapters(self.model)
        begin_sharded(self.model)

    def blank(self, stage: Stage | None = None) -> Pi05:
        """A model of the same parts without memory, frozen as in a stage: what a step costs can be counted on it."""
        with torch.device("meta"):
            model = Pi05(self.config, self.head_factories)
        if self.lora is not None:
            if self.base is not None:
                quantize_base(model, self.base, self.lora)
            add_adapters(model, self.lora)
        if self.activation_checkpointing:
            checkpoint_blocks(model)
        for name, parameter in model.named_parameters():
            # what a quantised layer holds never learns
            parameter.requires_grad = parameter.is_floating_point() and not (stage and stage.freezes(name))
        return model

    def _agree_on_chance(self) -> None:
        """Have every rank draw the same random numbers: of what they make, each keeps a slice."""
        generators: list[Any] = [torch.random, *([torch.cuda] if torch.get_default_device().type == "cuda" else [])]
        for generator in generators:
            generator.set_rng_state(self.trainer.strategy.broadcast(generator.get_rng_state()))

    def _check_sharding(self) -> None:
        """Raises ValueError where it is divided otherwise than this trainer would."""
        if isinstance(self.model, FSDPModule) != (self.sharding is not None):
            raise ValueError(
                "the model was made by a trainer with another strategy, and cannot be divided between ranks, or put"
                " together, any more: make a new Pi05Module, with model.init_from"
            )

    @property
    def _run_directory(self) -> str:
        return os.path.abspath("." if self._trainer is None else self.trainer.default_root_dir)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self._hollow = False
        return loaded

    def _check_weights(self) -> None:
        if self._hollow:
            raise RuntimeError(
                "the model has no weights: `will_be_restored` promised a checkpoint's, and none were loaded. Give the"
                " trainer a ckpt_path, or leave will_be_restored False"
            )

    def gathered(self, keep: bool = True) -> Pi05:
        """The model with whole weights, as they are now: itself, or where ranks divide them a copy for evaluation.

        Of that, which every rank must ask for, the tensors are in the type that training computes in.  keep: False on
        ranks that need none; theirs has no memory.
        """
        if self.sharding is None:
            return self.model
        return gather(self.model, self.blank(), self.sharding, keep).eval()

    @property
    def whole(self) -> Pi05:
        """What validation and prediction compute with: calls of parts of it, as many as each rank has a use for."""
        return self._whole[0] if self._whole else self.model

    def on_validation_start(self) -> None:
        """Raises ValueError for data of other robots than the weights know."""
        self._check_weights()
        if self.trainer.state.fn != "fit":
            self._compare(list(datamodule_of(self.trainer).own_processor.robots))
        self._whole = [self.gathered()]

    on_test_start = on_validation_start

    def _compare(self, robots: list[str]) -> None:
        """Say where the data are not as those that the weights were trained on, whose statistics count."""
        data = datamodule_of(self.trainer)
        check_measurable(data.processor, data.own_processor, robots)
        if data.processor is data.own_processor or not self.trainer.is_global_zero:
            return
        for difference in differences(data.processor.to_dict(), data.own_processor):
            if not difference.harmless:
                log.warning("%s; what the checkpoint has is used", difference)

    def cpu(self) -> Pi05Module:
        """As everywhere, except that a model without memory yet stays so: an error before `configure_model` shows."""
        return self if self.model.device.type == "meta" else super().cpu()

    def configure_optimizers(self) -> Any:
        # what no stage trains is left out of DDP's buckets; what one stage freezes is frozen by `StageSwitch`, later
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = self.recipe.trains(name)
        groups = param_groups(self.model.named_parameters(), self.recipe)
        optimizer = resumable(self.make_optimizer, groups)
        return [optimizer], [{"scheduler": StageSchedule(optimizer, self.recipe), "interval": "step"}]

    # --- training

    def on_before_batch_transfer(self, batch: Batch | Observed, dataloader_idx: int) -> Batch | Observed:
        """Raises ValueError for a training step, on one rank, that has nothing of what its stage trains."""
        if isinstance(batch, Observed):  # a policy takes it from here
            return batch
        if batch.step_counts is None:
            return self._with_noise(batch, 1, 0)
        weights = self.recipe.at(self.global_step).weights
        alone = self.trainer.world_size == 1
        if not weights or (alone and not any(self._of_terms(batch.step_counts, weights).values())):
            raise nothing_to_learn(weights)
        return batch

    def _with_noise(self, batch: Batch, draws: int, max_delay: int) -> Batch:
        """Draw noise and flow time on the CPU, keyed by sample: no device generator, no synchronisation."""
        rows, horizon, dims = batch.actions.shape
        batch.noise, batch.time = draw_noise(batch.key[:rows], self.seed, draws, horizon, dims, max_delay)
        return batch

    def counts(self, batch: Batch) -> Tensor:
        """Elements of each loss term in a training batch, i64[terms]; draws its noise, as flow time decides on some."""
        return self.model.counts(self._with_noise(batch, self.flow_draws, self.rtc_max_delay))

    def _of_terms(self, counts: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Of i64[terms], those of some terms, in the model's order."""
        return {name: count for name, count in zip(self.model.terms, counts, strict=True) if name in set(names)}

    def transfer_batch_to_device(
        self, batch: Batch | Observed, device: torch.device, dataloader_idx: int
    ) -> Batch | Observed:
        """Lightning itself waits for the copy of anything that is no plain tensor."""
        return batch if isinstance(batch, Observed) else batch.to(device, non_blocking=device.type == "cuda")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.lora is not None and self.lora.dropout:
            # dropout draws from torch's own generator, which no checkpoint holds
            batches = self.trainer.accumulate_grad_batches
            place = self.trainer.global_rank, self.global_step * batches + batch_idx % batches
            torch.manual_seed(hash((self.seed, *place)) % 2**63)
        stage = self.recipe.at(self.global_step)
        parts = self.sharding and self.sharding.anywhere(self.model.parts_of(batch, stage.weights))
        terms = self.model(batch, stage.weights, insulate=self.knowledge_insulation, parts=parts)
        assert batch.step_counts is not None
        counts = self._of_terms(batch.step_counts, stage.weights)
        means, self._step_counts = mean_terms(terms, counts, self.trainer.accumulate_grad_batches)
        loss = total_loss(means, stage.weights)
        if not terms:  # other batches of the step, or ranks, have something to learn from
            if self.sharding is None:
                loss = loss + 0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
            else:  # no rank has, and none calls a layer
                loss = loss.detach().requires_grad_()
        for name, value in ({f"{stage.name}/{term}": mean for term, mean in means.items()} | {"total": loss}).items():
            self._losses.setdefault(f"loss/{name}", []).append(value.detach())
        assert batch.drawn is not None
        self.finite.saw(means | {TOTAL: loss}, batch.drawn)
        return loss

    def logs_after(self, steps: int) -> bool:
        """Whether numbers are logged after so many optimizer steps: every `trainer.log_every_n_steps`, at 0 never."""
        interval: int = cast("Any", self.trainer).log_every_n_steps  # Lightning sets it without declaring it
        return steps > 0 and interval > 0 and steps % interval == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take no step that is not finite; at logging intervals log losses and gradient norms (before clipping).

        A term that had no element in the step is not logged. Raises ValueError where none had, and NotFinite.
        """
        losses, self._losses = self._losses, {}
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        stage = self.recipe.at(self.global_step)
        norms = self.finite.before_step(self.global_step, stage.name, self.model, optimizer, scaled=scaled)
        if not self.logs_after(self.global_step + 1):
            return
        values = {name: torch.stack(found).mean() for name, found in losses.items()}
        values |= {f"grad_norm/{part}": norm for part, norm in norms.items()}
        values |= self._step_counts
        numbers = torch.stack([value.to(self.device, torch.float32) for value in values.values()])
        scalars = dict(zip(values, numbers.tolist(), strict=True))
        counts = {term: scalars.pop(term) for term in self._step_counts}
        if not any(counts.values()):
            raise nothing_to_learn(stage.weights)
        for term in [term for term, count in counts.items() if not count]:
            del scalars[f"loss/{stage.name}/{term}"]
        rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        if self.finite.max_skipped:
            rates["skipped_steps"] = float(self.finite.skipped)
        for logger in self.loggers:
            # not with `self.log`, which would repeat a stage's last values all through the next one
            logger.log_metrics(scalars | rates, self.global_step)
        # for the progress bar, which reads it every step: from the host's memory
        self.log("loss", torch.tensor(scalars["loss/total"]), prog_bar=True, logger=False)

    # --- validation

    @property
    def measured_step(self) -> int:
        """Optimizer steps after which the weights are measured; a trainer that did not train them counts from 0."""
        return self.global_step if self.trainer.state.fn == "fit" else self._trained_at

    def on_validation_epoch_start(self) -> None:
        data = datamodule_of(self.trainer)
        subsets = [*data.evaluated_subsets, *data.empty_subsets]
        self.metrics = {subset: SubsetMetrics(subset, self.model, self.device) for subset in subsets}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Measured]:
        assert self.processor is not None
        subset = datamodule_of(self.trainer).evaluated_subsets[dataloader_idx]
        evaluator = Evaluator(self.whole, self.processor, self.num_steps, self.accuracy_threshold)
        measured = evaluator.measure(batch, subset)
        self.metrics[subset].update(measured)
        return {"measured": measured}

    def on_validation_epoch_end(self) -> None:
        self._whole = []
        self.results = compute_all(self.metrics)
        values = self._by_tag(self.results)
        self.log_dict(values, sync_dist=True)  # the same on every rank already, which Lightning cannot know
        if self.trainer.state.fn != "fit":
            # loggers take it for the x-axis; in double precision, as the default type may be bf16
            self.log("step", torch.tensor(self.measured_step, dtype=torch.float64))

    def _by_tag(self, results: dict[str, dict[str, float]]) -> dict[str, float]:
        split = datamodule_of(self.trainer).evaluated
        return {
            f"{split}{'_detail' if '/' in metric else ''}/{name}/{metric}": float(value)
            for name, metrics in results.items()
            for metric, value in metrics.items()
        }

    def validation_metrics(self) -> list[str]:
        """What validation of this run's data can log, before it has."""
        data = datamodule_of(self.trainer)
        return list(self._by_tag(metric_names(data.evaluated_subsets, data.empty_subsets, self.model)))

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    # --- prediction: what the policy would do that a checkpoint of these weights gives

    def on_predict_start(self) -> None:
        """Raises ValueError for what the policy cannot do, and data whose robots it was not trained on."""
        self._check_weights()
        data = datamodule_of(self.trainer)
        self._policies = {}
        self._compare(list(data.predicted_sources))
        self._whole = [self.gathered()]
        for name in data.predicted_sources:
            acting = replace(self.acting, robot=name)
            self._policies[name] = Inference(self.whole, data.processor, acting, self.seed, self.trained)

    def predict_step(self, batch: Observed, batch_idx: int, dataloader_idx: int = 0) -> Predicted:
        """Raises ValueError, with the place of the frames, where the policy refuses one, or its own chunk."""
        policy, config = self._policies[batch.source], self.config
        subtasks: list[str | None] = [None] * len(batch.frames)
        if not batch.frames:
            return Predicted(np.zeros((0, config.horizon, policy.action_dim), np.float32), subtasks)
        noise, _ = draw_noise(torch.tensor(batch.keys), self.seed, 1, config.horizon, config.action_dim)
        try:
            if policy.hierarchical:
                subtasks = list(policy.predict_subtasks(batch.frames))
            chunks = policy.predict_chunks(batch.frames, subtasks, self.acting.noise_scale * noise[:, 0])
        except ValueError as error:
            raise ValueError(
                f"data.sources.{batch.source}, a frame from {batch.places[0]} to {batch.places[-1]}: {error}"
            ) from error
        return Predicted(chunks, subtasks)

    def on_predict_end(self) -> None:
        self._whole, self._policies = [], {}

    # --- checkpoints

    def on_fit_start(self) -> None:
        for callback in self._callbacks:
            then = self._saved_arguments.get(callback.state_key, {})
            reapply(callback, then, self._given_arguments[callback.state_key])
        self._saved_arguments = {}

    def on_train_start(self) -> None:
        self._check_weights()
        self._trained_at, self._trained_with = self.global_step, self.processor
        self._losses = {}
        self.finite.begin()

    def on_train_end(self) -> None:
        self.finite.look(self.model)

    def on_fit_end(self) -> None:
        # another trainer counts its steps from 0
        self._trained, self._trained_at = self.trained, self.global_step

    @property
    def trained(self) -> Trained:
        """What the weights were trained on so far."""
        now = trained(self.recipe, self._trained_at, self.global_step, self.rtc_max_delay, self._learned)
        return self._trained + now

    def _learned(self, stage: Stage) -> list[str]:
        """A stage's loss terms that its data has samples of, and that its freezing leaves something to learn."""
        data, backbone = datamodule_of(self.trainer), list(self.model.backbone.parameters())
        drawn, modalities = data.drawn(stage), data.trained_by
        learned = []
        for head in self.model.heads.values():
            own = set(list(head.parameters()) or backbone)  # what predicts tokens has no weights of its own
            if any(stage.lr_factor(name) for name, parameter in self.model.named_parameters() if parameter in own):
                learned += [t for t in stage.weights if t in head.terms and not drawn.isdisjoint(modalities[t])]
        acts = not {"flow", "fast"}.isdisjoint(learned)
        return [*learned, ADVANTAGE] if acts and data.tells_advantage(stage) else learned

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything that a policy needs beside the weights: dimensions, tokenizers, statistics, prompts, abilities.

        The average and the configuration too, which callbacks could not add with `checkpoint.save_weights_only`.
        Raises NotFinite for weights that are not.
        """
        assert self.processor is not None
        self.finite.look(self.model)
        if self._left_out is not None:
            checkpoint[STATE_DICT] = self._left_out.strip(checkpoint[STATE_DICT])
        check_savable([*checkpoint["state_dict"].items(), *self.average.items()], self.global_step)
        checkpoint["pi05"] = {
            "model": self.config.to_dict(),
            "processor": self.processor.to_dict(),
            "lora": None if self.lora is None else asdict(self.lora),
            "base": self.base,
            "adapter_base": self._left_out and self._left_out.to_dict(),
            "trained": asdict(self.trained),
            "saved_at": time.time(),
            "skipped_steps": self.finite.skipped,
            "init_from": None if self.init_from is None else str(self.init_from),
            "callbacks": self._given_arguments,
        }
        if self.average:
            checkpoint[AVERAGE] = self.average
        if self.run_config is not None:
            checkpoint["config"] = self.run_config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for a checkpoint of another model, and for what a resumed run cannot go on with."""
        if "pi05" not in checkpoint:
            raise ValueError("the checkpoint is of something else: it has no `pi05` entry")
        saved = checkpoint["pi05"]
        if saved.get("adapter_base") is not None and self._left_out is not None:
            path = None if self._trainer is None else self.trainer.ckpt_path
            self._left_out.complete(checkpoint, self.model, path, self.init_from, self._run_directory)
        tensors = {name.removeprefix(PREFIX): value for name, value in checkpoint[STATE_DICT].items()}
        expected = shapes_of(self.model.state_dict())
        check_model(saved, self.config, self.lora, self.base, shapes_of(tensors), expected)
        self._trained = Trained.from_dict(saved.get("trained", {}))
        self._trained_at = checkpoint["global_step"]
        self.finite.skipped = saved.get("skipped_steps", 0)
        self._trained_with = Processor.from_dict(saved["processor"])
        if self._trainer is None:  # `load_from_checkpoint`
            return
        checkpoint.setdefault("callbacks", {})  # else, of weights alone, no callback is shown the checkpoint's average
        if self.trainer.state.fn == "fit":
            self._resume(checkpoint)
        else:
            data = datamodule_of(self.trainer)
            data.measure_with(self._trained_with)
            self.processor = data.processor

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what a resumed run would silently do otherwise than it was begun, or than it is told."""
        saved = checkpoint["pi05"]
        check_whole(checkpoint)
        said = [check_steps(checkpoint["global_step"], self.trainer.max_steps, self.recipe.total_steps)]
        said += check_data(saved["processor"], datamodule_of(self.trainer).own_processor)
        try:
            self.check_new()
        except ValueError as error:
            if not has_options(checkpoint.get("config"), self.run_config, "stages", "model.lora"):
                raise
            said.append(f"{error}")
        if not (self._left_out and self._left_out.is_at(self.init_from)):
            said.append(check_origin(self.init_from, saved))
        for message in filter(None, said if self.trainer.is_global_zero else []):
            log.warning("%s", message)
        self._saved_arguments = saved.get("callbacks", {})
        checkpoint["callbacks"] = find_states(self._callbacks, checkpoint["callbacks"])
