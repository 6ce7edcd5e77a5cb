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
    flow_acts: bool = False,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """`folder`, with an exported policy of a dataset's robot.

    flow_acts: the flow head does something;  data: options of the datamodule;  options: of the source.
    """
    model = untrained_model(config, seed)
    if flow_acts:
        for parameter in model.flow_head.parameters():  # at first its norms let nothing through
            torch.nn.init.normal_(parameter, std=0.05)
    robot = LeRobotConfig(str(dataset), **options)
    save(folder, model, Pi05DataModule({"robot": robot}, shapes=model.config.shapes, **(data or {})).processor)
    return folder
