"""How datasets are read for a policy: as those were that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

CLASS_PATH = f"{LeRobotConfig.__module__}.{LeRobotConfig.__name__}"
_OF_ONE_DATASET = {"path", "episodes", "labels", "same_robot_as"}


@dataclass(frozen=True)
class Reading:
    """Options of `LeRobotConfig` beside the path, the text tokenizer, and the FAST tokenizer if there is one."""

    options: dict[str, Any]
    tokenizer: str = "tiny"
    fast: str | None = None

    @classmethod
    def of(cls, policy: Path) -> Reading:
        """As the configuration says that a run's checkpoint carries; the defaults for weights that carry none."""
        weights = locate(policy)
        if not isinstance(weights, TrainingCheckpoint) or "config" not in weights.content:
            return cls({})
        data = yaml.safe_load(weights.run_config())["data"]
        sources = [source for source in data["sources"].values() if source["class_path"] == CLASS_PATH]
        options = sources[0]["init_args"] if sources else {}
        kept = {key: value for key, value in options.items() if key not in _OF_ONE_DATASET}
        return cls(kept, data["tokenizer"], data["fast"])

    def source(self, path: str, **options: Any) -> dict[str, Any]:
        """A source of a run's configuration."""
        return {"class_path": CLASS_PATH, "init_args": {**self.options, "path": path, **options}}
