"""A folder of a policy that LeRobot opens too, with the plugin `lerobot_policy_pi05_lightning` installed.

It is an exported folder whose config.json is LeRobot's. Normalisation, prompts and tokenizers stay in processor.json:
LeRobot's own processors, which have to be there, change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_lightning.data.processor import Processor
from pi05_lightning.files.local import write_json
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.folder import MODEL, PLUGIN, save
from pi05_lightning.weights.lerobot_processor import ACTION, STATE, image_keys
from pi05_lightning.weights.safetensors import CONFIG

if TYPE_CHECKING:
    from lerobot.configs import PolicyFeature
    from lerobot.processor import PolicyProcessorPipeline


def camera_of(key: str) -> str:
    """The name of the camera of an image feature, as LeRobot datasets are read too: the last part of its key."""
    return key.rpartition(".")[2]


def save_for_plugin(folder: Path, model: Pi05, processor: Processor, robot: str, trained: Trained) -> None:
    """Write a policy, as one of its robots, into a folder that this package and LeRobot with the plugin open.

    Raises ValueError for cameras that LeRobot cannot name.
    """
    only, size = processor.robots[robot], model.config.vision.image_size
    if dotted := [name for name in processor.cameras_of(robot) if "." in name]:
        raise ValueError(f"LeRobot takes the last part of a key for a camera's name, and {dotted[0]} has a dot")
    keys = image_keys(processor.cameras_of(robot))
    inputs = {key: {"type": "VISUAL", "shape": [3, size, size]} for key in keys}
    if only.state_dim:
        inputs[STATE] = {"type": "STATE", "shape": [only.state_dim]}
    save(folder, model, processor, trained)
    config: dict[str, Any] = {
        "type": PLUGIN,
        "input_features": inputs,
        "output_features": {ACTION: {"type": "ACTION", "shape": [only.action_dim]}},
        MODEL: model.config.to_dict(),
        "language": asdict(processor.language),
    }
    if only.relative is not None:
        config |= {"relative_dims": list(only.relative.dims), "relative_state_dims": list(only.relative.state_dims)}
    write_json(folder / CONFIG, config)
    for pipeline in pipelines({}, {}):
        pipeline.save_pretrained(folder)


def pipelines(
    inputs: Mapping[str, PolicyFeature], outputs: Mapping[str, PolicyFeature], device: str | None = None
) -> tuple[PolicyProcessorPipeline[Any, Any], PolicyProcessorPipeline[Any, Any]]:
    """LeRobot's processors before and after the policy, with the steps that its commands look for.

    They rename observations, make a batch of one observation and move it; their normalisers normalise nothing.
    """
    from lerobot.configs import FeatureType, NormalizationMode
    from lerobot.processor import (
        AddBatchDimensionProcessorStep,
        DeviceProcessorStep,
        NormalizerProcessorStep,
        RenameObservationsProcessorStep,
        UnnormalizerProcessorStep,
    )
    from lerobot.processor.factory import make_policy_processor_pipelines

    as_they_are = dict.fromkeys(FeatureType, NormalizationMode.IDENTITY)
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            NormalizerProcessorStep(features={**inputs, **outputs}, norm_map=as_they_are),
            DeviceProcessorStep(device=device or "cpu"),
        ],
        output_steps=[
            UnnormalizerProcessorStep(features={**outputs}, norm_map=as_they_are),
            DeviceProcessorStep(device="cpu"),
        ],
    )
