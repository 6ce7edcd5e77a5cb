"""TensorBoard's custom scalars by topic, with the stage beside every curve, and the resolved configuration."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from pi05_lightning.module import Pi05Module
from pi05_lightning.recipe import Recipe
from pi05_lightning.types import Modality

Layout = dict[str, dict[str, list[Any]]]
"""category -> chart -> ["Multiline", [regular expressions of tags]]"""

ACTION_METRICS = ("action_mae", "action_mse", "action_accuracy", "action_mae_real", "action_mse_real")
METRICS = {
    Modality.CONTINUOUS: ("flow_loss", *ACTION_METRICS),
    Modality.FAST: ("token_accuracy", "perplexity", "decode_success", *ACTION_METRICS[:3]),
    Modality.HL_SUBTASK: ("exact_match", "token_accuracy", "perplexity"),
    Modality.QA: ("exact_match", "box_iou", "token_accuracy", "perplexity"),
    Modality.WEB_CAPTION: ("exact_match", "token_accuracy", "perplexity"),
}


class Dashboard(Callback):
    """Lays out the CUSTOM SCALARS page of TensorBoard and writes the run's configuration under TEXT.

    `stage`, see `StageSwitch`, is the first chart of every category, so that the boundaries are where they are in the
    curves below it.
    """

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(pl_module.recipe))
                if pl_module.run_config is not None:
                    # four spaces make it code in Markdown
                    logger.experiment.add_text("config", indent(pl_module.run_config, "    "), 0)


def layout(recipe: Recipe) -> Layout:
    """Charts by topic; what a run does not log stays empty."""
    terms = list(dict.fromkeys(term for stage in recipe.reached for term in stage.weights))
    topics: dict[str, dict[str, list[str]]] = {
        "losses": {
            "total": ["loss/total"],
            **{f"{stage.name}, by term": [f"loss/{re.escape(stage.name)}/"] for stage in recipe.reached},
            **{term: [f"loss/[^/]+/{term}$"] for term in terms},
        },
        **{
            f"validation: {modality}": {metric: [f"val/(.*/)?{modality}/{metric}$"] for metric in metrics}
            for modality, metrics in METRICS.items()
        },
        "closed loop": {"success": [r"rollout(_\w+)?/.*success"], "cost": [r"rollout(_\w+)?/.*seconds"]},
        "learning rates": {"per group": ["lr/"]},
        "gradient norms": {"per module": ["grad_norm/"]},
        "speed": {
            "samples per second": ["throughput/samples_per_second"],
            "tokens per second": ["throughput/tokens_per_second"],
            "share of the hardware's rate": ["throughput/hardware_share"],
        },
        "data": {
            "mixture drawn": ["mixture/"],
            "bad samples": ["data/bad_samples"],
            "padding": ["data/padding"],
        },
        "memory": {"GB": ["memory/"]},
    }
    return {
        topic: {"stage": ["Multiline", ["stage$"]]} | {title: ["Multiline", tags] for title, tags in charts.items()}
        for topic, charts in topics.items()
    }
