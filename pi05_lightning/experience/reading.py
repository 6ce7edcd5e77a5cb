"""How datasets are read for a policy, as those were that it was trained on, and how it is trained on them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

CLASS_PATH = f"{LeRobotConfig.__module__}.{LeRobotConfig.__name__}"
TRAINER: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 20,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1_000_000,
    "num_sanity_val_steps": 0,
}
"""Of the trainings on experience: nothing is validated on the way."""
_OF_ANY_DATASET = {f.name for f in fields(LeRobotConfig)} - {
    "path",
    "episodes",
    "labels",
    "frames",
    "learn_subtasks",
    "same_robot_as",
}


@dataclass(frozen=True)
class Reading:
    """Options of `LeRobotConfig` beside the path, the text tokenizer, prompts, and noise draws per observation."""

    options: dict[str, Any]
    tokenizer: str = "tiny"
    language: dict[str, Any] = field(default_factory=dict)
    flow_draws: int = 1

    @classmethod
    def of(cls, policy: Path) -> Reading:
        """As the configuration says that a run's checkpoint carries; the defaults for weights that carry none."""
        weights = locate(policy)
        if not isinstance(weights, TrainingCheckpoint) or "config" not in weights.content:
            return cls({})
        config = yaml.safe_load(weights.run_config())
        data = config["data"]
        sources = [source for source in data["sources"].values() if source["class_path"] == CLASS_PATH]
        options = sources[0]["init_args"] if sources else {}
        kept = {key: value for key, value in options.items() if key in _OF_ANY_DATASET}
        return cls(kept, data["tokenizer"], data["language"], config["model"]["flow_draws"])

    def source(self, path: str, **options: Any) -> dict[str, Any]:
        """A source of a run's configuration."""
        return {"class_path": CLASS_PATH, "init_args": {**self.options, "path": path, **options}}
