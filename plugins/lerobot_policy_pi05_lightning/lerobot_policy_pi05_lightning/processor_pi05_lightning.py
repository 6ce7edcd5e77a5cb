"""LeRobot's processors of the policy. They normalise nothing: the policy itself takes and gives real units."""

from __future__ import annotations

from typing import Any

from lerobot.processor import PolicyProcessorPipeline

from lerobot_policy_pi05_lightning.configuration_pi05_lightning import Pi05LightningConfig
from pi05_lightning.weights.lerobot_plugin import pipelines


def make_pi05_lightning_pre_post_processors(
    config: Pi05LightningConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline[Any, Any], PolicyProcessorPipeline[Any, Any]]:
    """Before and after the policy; the statistics are the policy's own, and LeRobot's are not read."""
    return pipelines(config.input_features or {}, config.output_features or {}, config.device)
