"""What a policy must know of the robot that its data came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pi05_lightning.data.transforms import AbsoluteActions, Group, Normalize, Quantiles, RelativeActions, Unnormalize


@dataclass(frozen=True)
class Robot:
    """What a policy must know of the robot that a source's data came from."""

    normalize: Normalize
    """Quantiles of the training part's state and actions."""
    fps: float
    """Observations, and so actions, per second."""
    tasks: tuple[str, ...] = ()
    """The instructions that it was trained on."""
    dataset: str = ""
    """Where the demonstrations were."""
    relative: RelativeActions | None = None
    """Dims of the action that are trained on, and predicted, relative to the state."""
    embodiment: str = ""
    """What `{embodiment}` in a prompt stands for."""
    control_mode: str = ""
    """What `{control_mode}` in a prompt stands for."""
    has_subtasks: bool = True
    """Whether its data says what to do next."""

    @property
    def state_dim(self) -> int:
        """Dims of its state; 0 for data without one."""
        return len(self.normalize.state)

    @property
    def action_dim(self) -> int:
        """Dims of its action, before padding to the model's; 0 for data without actions."""
        return len(self.normalize.action)

    @property
    def acts(self) -> bool:
        """Whether its data holds actions; a policy acts as the first robot that does."""
        return self.action_dim > 0

    @property
    def transforms(self) -> Group:
        """The robot's units to the model's, and back."""
        group = Group()
        if self.relative is not None:
            group = group.push(self.relative, AbsoluteActions(self.relative))
        return group.push(self.normalize, Unnormalize(self.normalize.action))

    def to_dict(self) -> dict[str, Any]:
        """Plain types that a checkpoint can carry."""
        quantiles = {"state": self.normalize.state, "action": self.normalize.action}
        return {
            "fps": self.fps,
            "tasks": list(self.tasks),
            "dataset": self.dataset,
            "quantiles": {part: {"q01": q.q01.tolist(), "q99": q.q99.tolist()} for part, q in quantiles.items()},
            "relative": None if self.relative is None else {k: list(v) for k, v in asdict(self.relative).items()},
            "embodiment": self.embodiment,
            "control_mode": self.control_mode,
            "has_subtasks": self.has_subtasks,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Robot:
        """The inverse of `to_dict`; fields that an older checkpoint lacks take their defaults."""
        quantiles = {part: Quantiles(np.array(q["q01"]), np.array(q["q99"])) for part, q in values["quantiles"].items()}
        relative = values.get("relative")
        return cls(
            normalize=Normalize(**quantiles),
            fps=values["fps"],
            tasks=tuple(values["tasks"]),
            dataset=values["dataset"],
            relative=RelativeActions(**{k: tuple(v) for k, v in relative.items()}) if relative else None,
            embodiment=values.get("embodiment", ""),
            control_mode=values.get("control_mode", ""),
            has_subtasks=values.get("has_subtasks", True),
        )
