"""The LightningModule: glue between the model, the recipe, the optimizer and the logs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pi05_lightning.acting import Acting
from pi05_lightning.data.clock import check_clock
from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.data.differences import measured_otherwise
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.samples import Observed
from pi05_lightning.evaluation.metrics import Evaluator, Measured
from pi05_lightning.evaluation.metrics.questions import Table
from pi05_lightning.files.ranges import check_range
from pi05_lightning.losses import mean_terms, nothing_to_learn, total_loss
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.flow_noise import with_noise
from pi05_lightning.models.heads.base import HeadFactory
from pi05_lightning.models.parallelize import Lora, Sharding, gather
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind
from pi05_lightning.module.blueprint import Blueprint, check_division, division_under
from pi05_lightning.module.checkpoint import Checkpoints, check_ranks_opened_one
from pi05_lightning.module.finite import FiniteSteps, check_savable
from pi05_lightning.module.history import History, learned
from pi05_lightning.module.optimizer_state import resumable
from pi05_lightning.module.prediction import Predicted, Predictor
from pi05_lightning.module.step import StepLosses
from pi05_lightning.module.trainer import callbacks_of, logs_every
from pi05_lightning.module.validation import Validation, by_tag, tags
from pi05_lightning.optim import StageSchedule, check_optimizer, param_groups
from pi05_lightning.recipe import Recipe
from pi05_lightning.types import Batch
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.beginning import carried_on, moved_cameras
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.sharded_checkpoint import AVERAGE

log = logging.getLogger(__name__)


DEFAULT_LR = 2e-4


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW, where no optimizer is named."""
    return torch.optim.AdamW(parameters, lr=DEFAULT_LR, weight_decay=0.01, fused=True)


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
        compile: compile every block for training steps: on a GPU 1.4 times as fast, after half a minute.
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
        self.blueprint = Blueprint(self.config, heads, lora, base, activation_checkpointing, compile)
        self.init_from, self.make_optimizer = init_from, optimizer
        check_optimizer(optimizer)
        for name, value in {"flow_draws": flow_draws, "num_steps": num_steps}.items():
            check_range(f"model.{name}", value, 1)
        check_range("model.accuracy_threshold", accuracy_threshold, 0, above=True)
        if not 0 <= rtc_max_delay < self.config.horizon:
            raise ValueError(f"rtc_max_delay {rtc_max_delay} is not within 0 and the horizon of {self.config.horizon}")
        self.flow_draws, self.rtc_max_delay = flow_draws, rtc_max_delay
        self.knowledge_insulation = knowledge_insulation
        self.num_steps, self.accuracy_threshold, self.seed = num_steps, accuracy_threshold, seed
        self.processor: Processor | None = None
        self.results: dict[str, dict[str, float]] = {}
        self.questions: dict[str, Table] = {}
        """Of the last validation that was no part of training, by question."""
        self.model = self.blueprint.bare()
        self.follow(Recipe.of(pretrain_steps=0))
        self.will_be_restored = False
        """A checkpoint's weights follow: `configure_model` makes none that would be thrown away."""
        self.restored_hash: str | None = None
        """`Weights.content_hash` of that checkpoint, where it was taken before."""
        self._history = History()
        self.acting = Acting()
        """How a prediction acts."""
        self._checkpoints = Checkpoints(self.blueprint, init_from)
        self._validation: Validation | None = None
        self._predictor: Predictor | None = None
        self.average: dict[str, Tensor] = {}
        """Of the weights, by name, if they are averaged."""
        self.run_config: str | None = None
        """The configuration of the run, as YAML, if it has one."""
        self.sharding: Sharding | None = None
        """How the model is divided between the ranks, if it is; the strategy fsdp2 says so."""
        self._whole: list[Pi05] = []
        """The gathered model, while there is one; in a list, as it is no part of this module."""
        self._configured = False
        self._hollow = False
        """Its parameters have memory, and nothing in it: a checkpoint's weights have yet to come."""
        self._step = StepLosses()
        self.finite = FiniteSteps(max_skipped_steps, lambda drawn: datamodule_of(self.trainer).addresses(drawn))

    # --- building

    def setup(self, stage: str) -> None:
        self.sharding = division_under(self.trainer.strategy, self.sharding, self.blueprint.base)
        if stage == "fit":
            check_clock(self.trainer)
        data = datamodule_of(self.trainer)
        data.measure_with(None if stage == "fit" else self._history.processor)
        self.processor = data.processor
        self._checkpoints.note_arguments(callbacks_of(self.trainer, Callback))

    def follow(self, recipe: Recipe) -> None:
        """Train by a recipe; what LoRA leaves alone is frozen in all of its stages.

        Raises ValueError for losses that no head of the model has.
        """
        recipe.check_terms(self.model.terms)
        lora = self.blueprint.lora
        self.recipe = recipe if lora is None else recipe.freezing(lora.frozen)

    def check_new(self) -> None:
        """Before a new run: ValueError for patterns that no parameter matches, and warm-ups longer than their stage.

        A run that is resumed with the options it was begun with goes on, and is told of them.
        """
        lora = self.blueprint.lora
        names = [name for name, _ in (self.model if lora is None else self.blueprint.blank()).named_parameters()]
        self.recipe.check_followed(names)
        if lora is not None:
            lora.check_patterns(names)

    def configure_model(self) -> None:
        """Give the parameters memory and values, then add what the options ask for; once."""
        if self._configured:
            check_division(self.model, self.sharding)
            return
        self._configured = True
        blank = self.model.device.type == "meta"
        weights = locate(self.init_from) if self.init_from and blank and not self.will_be_restored else None
        given = self.model, weights, self.processor, self.will_be_restored
        if self.sharding is None:
            self.blueprint.make(*given)
        else:
            self.blueprint.make_shards(*given, self.sharding, self.trainer.strategy.broadcast)
        self._hollow = blank and self.will_be_restored
        if weights is not None:
            for note in weights.notes:
                rank_zero_warn(f"{weights.path}: {note}")
            if found := moved_cameras(self.model, weights, self.processor):
                rank_zero_warn(found)
            self._history.before = carried_on(weights, self.processor)
            self._checkpoints.began(weights, self._run_directory)

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

        Collective where ranks divide them: every rank must call it. The copy's tensors are in the type that training
        computes in.  keep: False on ranks that need none; theirs has no memory.
        """
        if self.sharding is None:
            return self.model
        return gather(self.model, self.blueprint.blank(), self.sharding, keep).eval()

    @property
    def gathered_model(self) -> Pi05:
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
        self._say(measured_otherwise(data.processor, data.own_processor, robots))

    def _say(self, messages: list[str]) -> None:
        for message in messages if self.trainer.is_global_zero else []:
            log.warning("%s", message)

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
            return with_noise(batch, self.seed)
        weights = self.recipe.at(self.global_step).weights
        alone = self.trainer.world_size == 1
        if not weights or (alone and not any(self._of_terms(batch.step_counts, weights).values())):
            raise nothing_to_learn(weights)
        return batch

    def with_noise(self, batch: Batch) -> Batch:
        """A training batch with its noise and flow time, which decides how many elements some loss terms have."""
        return with_noise(batch, self.seed, self.flow_draws, self.rtc_max_delay)

    def _of_terms(self, counts: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Of i64[terms], those of some terms, in the model's order."""
        wanted = set(names)
        return {name: count for name, count in zip(self.model.terms, counts, strict=True) if name in wanted}

    def transfer_batch_to_device(
        self, batch: Batch | Observed, device: torch.device, dataloader_idx: int
    ) -> Batch | Observed:
        """Lightning itself waits for the copy of anything that is no plain tensor."""
        if isinstance(batch, Observed):
            return batch
        if device.type == "cuda":
            batch = batch.pin_memory()  # of which noise, times and counts are not yet
        return batch.to(device, non_blocking=device.type == "cuda")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batches = self.trainer.accumulate_grad_batches
        self._seed(self.trainer.global_rank, self.global_step * batches + batch_idx % batches)
        stage = self.recipe.at(self.global_step)
        parts = self.sharding and self.sharding.anywhere(self.model.parts_of(batch, stage.weights))
        terms = self.model(batch, stage.weights, insulate=self.knowledge_insulation, parts=parts)
        assert batch.step_counts is not None
        counts = self._of_terms(batch.step_counts, stage.weights)
        means, counted = mean_terms(terms, counts, self.trainer.accumulate_grad_batches)
        loss = total_loss(means, stage.weights)
        if not terms:  # other batches of the step, or ranks, have something to learn from
            if self.sharding is None:
                loss = loss + 0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
            else:  # no rank has, and none calls a layer
                loss = loss.detach().requires_grad_()
        assert batch.drawn is not None
        self._step.saw(means, counted, loss, batch.drawn)
        return loss

    def _seed(self, *place: int) -> None:
        """Make what is drawn from torch's own generators, as by dropout, a function of a place in the run.

        No checkpoint holds these generators.
        """
        torch.manual_seed(hash((self.seed, *place)) % 2**63)

    def logs_after(self, steps: int) -> bool:
        """Whether numbers are logged after so many optimizer steps: every `trainer.log_every_n_steps`, at 0 never."""
        interval = logs_every(self.trainer)
        return steps > 0 and interval > 0 and steps % interval == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take no step that is not finite; at logging intervals log losses and gradient norms (before clipping).

        A term that had no element in the step is not logged. What the optimizer draws, as to round at random, is the
        same on every rank. Raises ValueError where no term had an element, and StepNotFinite.
        """
        step, self._step = self._step, StepLosses()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        stage = self.recipe.at(self.global_step)
        scaled = scaler is not None
        norms = self.finite.before_step(self.global_step, stage, step, self.model, optimizer, scaled)
        if self.logs_after(self.global_step + 1):
            if scaler is not None and optimizer.defaults.get("fused"):  # it scales them back itself, later
                norms = {part: norm / scaler.get_scale() for part, norm in norms.items()}
            self._log(step.scalars(stage, norms, self.device), optimizer)
        self._seed(self.global_step)

    def _log(self, scalars: dict[str, float], optimizer: torch.optim.Optimizer) -> None:
        """Log numbers of a step, and the rates that it is taken at."""
        rates = {f"lr/{group['name']}": float(group["lr"]) for group in optimizer.param_groups}
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
        return self.global_step if self.trainer.state.fn == "fit" else self._history.step

    def on_validation_epoch_start(self) -> None:
        self._validation = Validation(datamodule_of(self.trainer), self.model, self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Measured | None]:
        assert self.processor is not None
        assert self._validation is not None
        evaluator = Evaluator(self.gathered_model, self.processor, self.num_steps, self.accuracy_threshold)
        return {"measured": self._validation.add(batch, dataloader_idx, evaluator)}

    def on_validation_epoch_end(self) -> None:
        assert self._validation is not None
        self._whole = []
        self.results = self._validation.results()
        values = by_tag(self.results, datamodule_of(self.trainer).evaluated)
        # the same on every rank already, which Lightning cannot know; in `fit` it would log the step before
        self.log_dict(values, sync_dist=True, logger=False)
        for logger in [] if self.trainer.sanity_checking else self.loggers:
            logger.log_metrics(values, self.measured_step)
        if self.trainer.state.fn != "fit":
            self.questions = self._validation.by_question()

    def validation_metrics(self) -> list[str]:
        """What validation of this run's data can log, before it has."""
        return tags(datamodule_of(self.trainer), self.model)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    # --- prediction: what the policy would do that a checkpoint of these weights gives

    def on_predict_start(self) -> None:
        """Raises ValueError for what the policy cannot do, and data whose robots it was not trained on."""
        self._check_weights()
        data = datamodule_of(self.trainer)
        cameras = {name: source.camera_names for name, source in data.predicted_sources.items()}
        self._compare(list(cameras))
        self._whole = [self.gathered()]
        self._predictor = Predictor(cameras, self.gathered_model, data.processor, self.acting, self.seed, self.trained)

    def predict_step(self, batch: Observed, batch_idx: int, dataloader_idx: int = 0) -> Predicted:
        assert self._predictor is not None
        return self._predictor.predict(batch)

    def on_predict_end(self) -> None:
        self._whole, self._predictor = [], None

    # --- checkpoints

    def on_fit_start(self) -> None:
        self._checkpoints.reapply_arguments(callbacks_of(self.trainer, Callback))

    def on_train_start(self) -> None:
        self._check_weights()
        self._history.step, self._history.processor = self.global_step, self.processor
        self._step = StepLosses()
        self.finite.begin()

    def on_train_end(self) -> None:
        self.finite.look(self.model)

    def on_fit_end(self) -> None:
        # another trainer counts its steps from 0
        self._history.before, self._history.step = self.trained, self.global_step

    @property
    def begun_with(self) -> str | None:
        """The Hub's name of the weights that the run began with, where they came from there."""
        return self._checkpoints.hub_id

    @property
    def trained(self) -> Trained:
        """What the weights were trained on so far."""
        return self._history.until(
            self.global_step,
            self.recipe,
            self.rtc_max_delay,
            lambda stage: learned(stage, self.model, datamodule_of(self.trainer)),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a policy needs beside the weights, see `Checkpoints.entry`.

        The average and the configuration too, which callbacks could not add with `checkpoint.save_weights_only`.
        Raises StepNotFinite for weights that are not.
        """
        assert self.processor is not None
        self.finite.look(self.model)
        self._checkpoints.strip(checkpoint)
        check_savable([*checkpoint["state_dict"].items(), *self.average.items()], self.global_step)
        checkpoint["pi05"] = self._checkpoints.entry(self.trainer, self.processor, self.trained, self.finite.skipped)
        if self.average:
            checkpoint[AVERAGE] = self.average
        if self.run_config is not None:
            checkpoint["config"] = self.run_config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for a checkpoint of another model, and for what a resumed run cannot go on with.

        Collective under a trainer, all of whose ranks have to open the same one.
        """
        path = None if self._trainer is None else self.trainer.ckpt_path
        if self._trainer is not None:
            check_ranks_opened_one(checkpoint)
        self._checkpoints.complete(checkpoint, self.model, path, self._run_directory)
        self._history = History.of_checkpoint(checkpoint)
        self.finite.skipped = checkpoint["pi05"].get("skipped_steps", 0)
        if self._trainer is None:  # `load_from_checkpoint`
            return
        checkpoint.setdefault("callbacks", {})  # else, of weights alone, no callback is shown the checkpoint's average
        if self.trainer.state.fn == "fit":
            options = self.recipe, self.run_config, self.check_new
            self._say(self._checkpoints.resume(checkpoint, self.trainer, *options))
        else:
            data = datamodule_of(self.trainer)
            data.measure_with(self._history.processor)
            self.processor = data.processor
