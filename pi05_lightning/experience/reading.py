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
_OF_ANY_DATASET = {f.name for f in fields(LeRobotConfig)} - {"path", "episodes", "labels", "frames", "same_robot_as"}


@dataclass(frozen=True)
class Reading:
    """How a policy's datasets are read, and what it was last trained on, as its run's configuration says.

    flow_draws: noise draws per observation.  fast: FAST tokenizer.  sources: of the run, by name.  stage: losses,
    mixture and flow_alpha of the last one that trained the flow.  Weights that carry no configuration leave all of it
    empty, or at its default.
    """

    tokenizer: str = "tiny"
    language: dict[str, Any] = field(default_factory=dict)
    flow_draws: int = 1
    fast: str | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Path) -> Reading:
        weights = locate(policy)
        if not isinstance(weights, TrainingCheckpoint) or "config" not in weights.content:
            return cls()
        config = yaml.safe_load(weights.run_config())
        data = config["data"]
        return cls(
            data["tokenizer"],
            data["language"],
            config["model"]["flow_draws"],
            data["fast"],
            data["sources"],
            _last_stage(config["stages"]),
        )

    def source(self, path: str, like: str, **options: Any) -> dict[str, Any]:
        """A source of a run's configuration."""
        return {"class_path": CLASS_PATH, "init_args": {**self.options(path, like), "path": path, **options}}

    def options(self, path: str, like: str) -> dict[str, Any]:
        """How the run read the dataset at a path, as options of `LeRobotConfig`.

        like: another dataset of the same robot, as which one is read that the run had not; if it had neither, as the
        first that it had.
        """
        robots = self._robots
        name = self.name_of(path) or self.name_of(like) or next(iter(robots), None)
        read = robots[name] if name else {}
        return {key: value for key, value in read.items() if key in _OF_ANY_DATASET}

    def name_of(self, path: str) -> str | None:
        """What the run called the dataset at a path."""
        asked = Path(path).resolve()
        return next((name for name, read in self._robots.items() if Path(read["path"]).resolve() == asked), None)

    @property
    def others(self) -> dict[str, dict[str, Any]]:
        """The run's sources that are no robot's, as far as their data is there."""
        found = {name: source for name, source in self.sources.items() if source["class_path"] != CLASS_PATH}
        return {name: source for name, source in found.items() if Path(source["init_args"].get("path", ".")).exists()}

    @property
    def _robots(self) -> dict[str, dict[str, Any]]:
        """Options of the run's LeRobot datasets, by the sources' names."""
        return {name: s["init_args"] for name, s in self.sources.items() if s["class_path"] == CLASS_PATH}


def _last_stage(stages: dict[str, Any]) -> dict[str, Any]:
    """Losses, mixture and flow_alpha of the last stage that trained the flow."""
    own = [(stages["pretrain_steps"], {**stages["pretrain"], "flow_alpha": 1.0})]
    own.append((stages["posttrain_steps"], {**stages["posttrain"], "flow_alpha": stages["flow_alpha"]}))
    own += [(stage["steps"], stage) for stage in stages["then"]]
    last: dict[str, Any] = next((stage for steps, stage in reversed(own) if steps and stage["losses"]["flow"]), {})
    return {key: last[key] for key in ("losses", "mixture", "flow_alpha") if key in last}
