"""The LightningModule: glue between the model, the recipe, the optimizer and the logs."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from pi05_lightning.data.datamodule import datamodule_of
from pi05_lightning.data.processor import Processor
from pi05_lightning.losses import draw_noise, loss_terms, total_loss
from pi05_lightning.metrics import ModalityMetrics
from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.fast import FastHead
from pi05_lightning.models.heads.flow import FlowHead
from pi05_lightning.models.heads.subtask import SubtaskHead
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.optim import param_groups, stage_schedule
from pi05_lightning.recipe import LossWeights, Recipe
from pi05_lightning.types import Batch


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01, fused=True)


class Pi05Module(LightningModule):
    """π0.5 under training: backbone, subtask head, FAST head and flow head.

    What a step trains is the recipe's business (`StageSwitch`); without one, it is the posttrain stage throughout.

    Args:
        config: the model's dimensions.
        optimizer: makes the optimizer from parameter groups; groups and their schedule come from the recipe.
        flow_draws: noise draws per observation and step; they share one backbone pass.
        knowledge_insulation: the flow loss gives the backbone no gradient.
        num_steps: Euler steps when validation samples actions.
        seed: of noise and flow time; each sample's draw depends on this and its key alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerCallable = default_optimizer,
        flow_draws: int = 1,
        knowledge_insulation: bool = False,
        num_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.make_optimizer = config, optimizer
        self.flow_draws, self.knowledge_insulation = flow_draws, knowledge_insulation
        self.num_steps, self.seed = num_steps, seed
        self.recipe = Recipe(pretrain_steps=0)
        self.processor: Processor | None = None
        self.metrics: dict[str, ModalityMetrics] = {}
        with torch.device("meta"):
            self.model = Pi05(config)

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone

    @property
    def subtask_head(self) -> SubtaskHead:
        return self.model.subtask_head

    @property
    def fast_head(self) -> FastHead:
        return self.model.fast_head

    @property
    def flow_head(self) -> FlowHead:
        return self.model.flow_head

    # --- building

    def setup(self, stage: str) -> None:
        self.processor = datamodule_of(self.trainer).processor

    def configure_model(self) -> None:
        """Give the parameters memory and values, once; a checkpoint that is being resumed overwrites them."""
        if self.model.device.type != "meta":
            return
        self.model.to_empty(device=self.device)
        self.model.reset_parameters(self.processor.tokenizer.ordinal_ids() if self.processor else None)

    def cpu(self) -> Pi05Module:
        """As everywhere, except that a model without memory yet stays so: an error before `configure_model` shows."""
        return self if self.model.device.type == "meta" else super().cpu()

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(param_groups(self.model.named_parameters(), self.recipe))
        return [optimizer], [{"scheduler": stage_schedule(optimizer, self.recipe), "interval": "step"}]

    # --- training

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw noise and flow time on the CPU, keyed by sample: no device generator, no synchronisation."""
        draws = self.flow_draws if self.trainer.training else 1
        rows, horizon, dims = batch.actions.shape
        batch.noise, batch.time = draw_noise(batch.key[:rows], self.seed, draws, horizon, dims)
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weights = self.recipe.loss_weights(self.global_step)
        out = self.model(
            batch,
            tokens=bool(weights.text or weights.subtask or weights.fast),
            actions=bool(weights.flow),
            points=bool(weights.location),
            insulate=self.knowledge_insulation,
        )
        terms = loss_terms(out, batch)
        loss = total_loss(terms, weights)
        self._log_losses(loss, terms, weights, len(batch))
        return loss

    def _log_losses(self, loss: Tensor, terms: dict[str, Tensor], weights: LossWeights, size: int) -> None:
        stage = self.recipe.stage_at(self.global_step)
        if (self.global_step + 1) % cast("Any", self.trainer).log_every_n_steps == 0:
            # not with `self.log`, which would repeat a stage's last values all through the next one
            used = {
                f"loss/{stage}/{name}": float(term.detach()) for name, term in terms.items() if getattr(weights, name)
            }
            for logger in self.loggers:
                logger.log_metrics(used, self.global_step)
        self.log("loss/total", loss.detach(), prog_bar=True, batch_size=size)

    # --- validation

    def on_validation_epoch_start(self) -> None:
        self.metrics = {name: ModalityMetrics(name) for name in datamodule_of(self.trainer).validation_names}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self.processor is not None
        metrics = list(self.metrics.values())[dataloader_idx]
        metrics.update(self.model, self.processor, batch, num_steps=self.num_steps)

    def on_validation_epoch_end(self) -> None:
        for name, metrics in self.metrics.items():
            self.log_dict({f"val/{name}/{key}": value for key, value in metrics.compute().items()}, sync_dist=False)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Normalised action chunks f32[R T D] for the rows of the batch that have actions."""
        assert batch.noise is not None
        prefix = self.model.backbone(batch, need_hidden=False)
        rows = len(batch.actions)
        return self.model.flow_head.sample(prefix.rows(rows), batch.noise[:, :1], self.num_steps)[:, 0]

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything that a policy needs beside the weights: dimensions, tokenizers, statistics, prompts."""
        assert self.processor is not None
        checkpoint["pi05"] = {"model": self.config.to_dict(), "processor": self.processor.to_dict()}
