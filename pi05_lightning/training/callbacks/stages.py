"""The stage switch: training moves from stage to stage at exactly the steps that the recipe says."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.distributed.fsdp import FSDPModule

from pi05_lightning.data.clock import check_clock
from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import leaves_nothing
from pi05_lightning.recipe import Recipe, Stage
from pi05_lightning.training.callbacks.interrupt import within_step
from pi05_lightning.training.precision import check_scaled, replaced
from pi05_lightning.training.rehearsal import rehearse
from pi05_lightning.weights.resumed import check_steps

log = logging.getLogger(__name__)


class StageSwitch(Callback):
    """Gives module and data their recipe and their precision, freezes what a stage freezes, marks where a stage begins.

    Before the first step it tries what every stage draws and trains, see `rehearse`. It logs `stage` (0 pretrain, 1
    posttrain, and so on) where a stage begins and at every logging interval.
    All that a stage decides is a pure function of the step, so a run that is stopped and resumed on either side of a
    switch continues as it would have. Without `max_steps` the trainer stops after the last stage.
    Its arguments are those of `Recipe.of`.
    """

    def __init__(self, *stages: Any, **options: Any) -> None:
        self.recipe = Recipe.of(*stages, **options)
        self._entered: str | None = None
        self._reached: dict[str, set[str]] = {}
        """See `rehearse`."""
        self._is_resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Pi05Module):
            raise ValueError(f"StageSwitch drives a Pi05Module, not a {type(pl_module).__name__}")
        self.apply(trainer, pl_module, stage)
        trainer.strategy.precision_plugin = replaced(trainer.precision_plugin)
        datamodule_of(trainer).recipe = self.recipe
        if trainer.world_size > 1:  # on a CPU, ranks that compile at once in one folder read each other's half files
            folder = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_rank{trainer.local_rank}")
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))

    def apply(self, trainer: Trainer, pl_module: Pi05Module, stage: str) -> None:
        """Give module and trainer the recipe; no data are needed. Raises ValueError for what cannot be followed."""
        pl_module.follow(self.recipe)
        if stage != "fit":
            return
        if trainer.max_steps == -1:
            trainer.fit_loop.epoch_loop.max_steps = self.recipe.total_steps
        check_clock(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._is_resumed = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        if not self._is_resumed:
            pl_module.check_new()
            said = check_steps(0, trainer.max_steps, self.recipe.total_steps)
            if said and not leaves_nothing(trainer):
                rank_zero_warn(said)
        self._is_resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        check_scaled(trainer)
        self._reached = rehearse(trainer, pl_module)
        self._entered = None
        self._enter(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._enter(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Pi05Module)
        done = trainer.global_step
        if pl_module.logs_after(done) and not within_step(trainer):
            self._log(trainer, done - 1)  # the step that was trained

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        step = trainer.global_step
        stage = pl_module.recipe.at(step)
        if stage.name == self._entered:
            return
        self._entered = stage.name
        if isinstance(pl_module.model, FSDPModule):
            pl_module.model.reshard()  # a parameter that is frozen or not while it is whole would get one gradient more
        for parameter_name, parameter in pl_module.model.named_parameters():
            parameter.requires_grad = not stage.freezes(parameter_name)
        if isinstance(trainer.strategy, DDPStrategy):
            wrap(trainer.strategy, pl_module, self._reached.get(stage.name))
        self._announce(trainer, stage, step)

    def _log(self, trainer: Trainer, step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"stage": float(self.recipe.number(step))}, step)

    @rank_zero_only
    def _announce(self, trainer: Trainer, stage: Stage, step: int) -> None:
        log.info("step %d: %s stage, loss weights %s", step, stage.name, stage.weights)
        self._log(trainer, step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("stage", f"{stage.name} from step {step}: {stage.weights}", step)


def wrap(strategy: DDPStrategy, module: Pi05Module, reached: set[str] | None) -> None:
    """Have DDP wait for the gradients of what a stage trains, and of nothing else.

    reached: the parameters that every batch trains, on every rank. The others that may learn are frozen then: nothing
    in the stage would give them a gradient. None: it is not known, and DDP looks at each batch anew.
    """
    if reached is not None:
        for name, parameter in module.model.named_parameters():
            parameter.requires_grad = name in reached
    given = strategy._ddp_kwargs
    search = reached is None or given.get("find_unused_parameters", False)  # the user may want it anyway
    strategy.model, strategy._ddp_kwargs = module, given | {"find_unused_parameters": search}
    strategy.configure_ddp()
    strategy._ddp_kwargs = given
