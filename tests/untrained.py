"""Models and policies with random weights, where it matters that there is one, not what it was taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pi05_lightning import Pi05DataModule
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.folder import save


def untrained_model(config: ModelConfig | str = "debug", seed: int = 0) -> Pi05:
    """Of a shipped size or of other dimensions; the weights follow from them and the seed."""
    model = Pi05(ModelConfig.preset(config) if isinstance(config, str) else config)
    torch.manual_seed(seed)
    model.reset_parameters()
    return model


def seeing(model: Pi05, speaks: bool = True) -> Pi05:
    """The model, changed in place: what it does, and says if it `speaks`, depends on what it is given.

    Of a new one, the norms of the flow head let nothing through, and each token is said again.
    """
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            parameter.normal_(std=0.05)
        if speaks:
            model.backbone.embed_tokens.weight.mul_(0.2)
    return model


def untrained_weights(folder: Path, seed: int = 0) -> Path:
    """`folder`, with the weights of a debug model and nothing else."""
    save(folder, untrained_model(seed=seed))
    return folder


def untrained_policy(
    folder: Path,
    dataset: Path,
    config: ModelConfig | str = "debug",
    seed: int = 0,
    *,
    speaks: bool = True,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """`folder`, with an exported policy of a dataset's robot.

    speaks: see `seeing`;  data: options of the datamodule;  options: of the source.
    """
    model = seeing(untrained_model(config, seed), speaks)
    robot = LeRobotConfig(str(dataset), **options)
    save(folder, model, Pi05DataModule({"robot": robot}, shapes=model.config.shapes, **(data or {})).processor)
    return folder
