"""What a policy must know of the robot that its data came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pi05_lightning.data.looks import Look
from pi05_lightning.data.transforms import Normalize, Quantiles, RelativeActions
from pi05_lightning.types import Frame

OUTLIER = 1e3  # a normalised value so far from -1..1 is a broken sensor, or a range that the statistics did not see
OUTLIER_REMEDY = (
    "The value is wrong, or this dimension hardly ever changes. Correct it, leave the episode out, or set `min_range`"
)


def outlier(frame: Frame) -> str | None:
    """Which value of a normalised frame no statistics explain, in words; None where all are in reach."""
    for name, values in (("state", frame.state), ("action", frame.actions)):
        if values is not None and values.size and not np.abs(values).max() <= OUTLIER:
            worst = np.abs(values).reshape(-1, values.shape[-1]).max(0)
            dim = int(np.argmax(~(worst <= OUTLIER)))
            return f"dimension {dim} of its {name} is {worst[dim]:.3g} when normalised, and -1 to 1 is usual"
    return None


Range = tuple[tuple[float, ...], tuple[float, ...]]
"""Least and greatest value of every dim."""


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
    state_keys: tuple[str, ...] = ("observation.state",)
    """Their features that make up the state."""
    action_keys: tuple[str, ...] = ("action",)
    """Those that make up the action."""
    relative: RelativeActions | None = None
    """Dims of the action that are trained on, and predicted, relative to the state."""
    embodiment: str = ""
    """What `{embodiment}` in a prompt stands for."""
    control_mode: str = ""
    """What `{control_mode}` in a prompt stands for."""
    has_subtasks: bool = True
    """Whether its data says what to do next."""
    cameras: tuple[str, ...] | None = None
    """The cameras of its data; None where an older checkpoint does not say."""
    state_range: Range | None = None
    """Least and greatest value of every dim of the state in the training part; None where nothing tells."""
    horizon: int | None = None
    """Actions of a chunk that its data has, where they are less than the model's; the others are never trained."""
    same_as: str = ""
    """The source of which this is the robot, whose statistics these are; its own where it is empty."""
    fps_is_known: bool = True
    """Whether anything says so: LeRobot's and openpi's weights do not, and it is π0.5's then."""
    is_on_hub: bool = False
    """Whether `dataset` is the Hub's name of it, from where it was opened; an older checkpoint does not say."""
    looks: Mapping[str, Look] = field(default_factory=dict)
    """How the images of its cameras look; those of which nothing tells are left out."""

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
        """Whether its data holds actions, so that a policy can act as it."""
        return self.action_dim > 0

    def with_data_of(self, other: Robot) -> Robot:
        """The same robot, which was trained on the data of another source too; its quantiles stay these."""
        return replace(
            self,
            tasks=tuple(sorted({*self.tasks, *other.tasks})),
            has_subtasks=self.has_subtasks or other.has_subtasks,
            horizon=max(self.horizon, other.horizon) if self.horizon and other.horizon else None,
            state_range=_either(self.state_range, other.state_range),
        )

    def to_model(self, frame: Frame) -> Frame:
        """The frame in the model's units."""
        return self.normalize(frame if self.relative is None else self.relative(frame))

    def to_real(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        """The inverse: model actions f32[... T A], which answer a frame, in the robot's units."""
        actions = self.normalize.action.unnormalize(actions)
        return actions if self.relative is None else self.relative.undo(actions, frame)

    def state_distance(self, state: np.ndarray) -> np.ndarray:
        """How far a state f32[S] is outside the training data, f64[S], see `Quantiles.distance`.

        0 in `state_range`, widened by half of it on both sides: what was rare in training may come again.
        """
        distance = self.normalize.state.distance(state)
        if self.state_range is None:
            return distance
        least, greatest = np.array(self.state_range)
        margin = (greatest - least) / 2
        return np.where((state >= least - margin) & (state <= greatest + margin), 0, distance)

    def action_distance(self, actions: np.ndarray, frame: Frame) -> np.ndarray:
        """The same of actions f32[T A] in the robot's units, which answer a frame, by quantiles alone; f64[T A]."""
        shown = replace(frame, actions=actions)
        moved = shown if self.relative is None else self.relative(shown)
        assert moved.actions is not None
        return self.normalize.action.distance(moved.actions)

    def to_dict(self) -> dict[str, Any]:
        """Plain types that a checkpoint can carry."""
        quantiles = {"state": self.normalize.state, "action": self.normalize.action}
        plain = {name: value for name, value in vars(self).items() if name != "normalize"}
        return plain | {
            "tasks": list(self.tasks),
            "state_keys": list(self.state_keys),
            "action_keys": list(self.action_keys),
            "cameras": None if self.cameras is None else list(self.cameras),
            "state_range": None if self.state_range is None else [list(values) for values in self.state_range],
            "looks": {camera: look.to_dict() for camera, look in self.looks.items()},
            "quantiles": {part: {"q01": q.q01.tolist(), "q99": q.q99.tolist()} for part, q in quantiles.items()},
            "relative": None if self.relative is None else {k: list(v) for k, v in asdict(self.relative).items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Robot:
        """The inverse of `to_dict`; fields that an older checkpoint lacks take their defaults."""
        quantiles = {part: Quantiles(np.array(q["q01"]), np.array(q["q99"])) for part, q in values["quantiles"].items()}
        relative, cameras, state_range = (values.get(name) for name in ("relative", "cameras", "state_range"))
        plain = {name: value for name, value in values.items() if name != "quantiles"} | {
            "tasks": tuple(values["tasks"]),
            "state_keys": tuple(values.get("state_keys", cls.state_keys)),
            "action_keys": tuple(values.get("action_keys", cls.action_keys)),
            "relative": RelativeActions(**{k: tuple(v) for k, v in relative.items()}) if relative else None,
            "cameras": None if cameras is None else tuple(cameras),
            "state_range": None if state_range is None else tuple(map(tuple, state_range)),
            "looks": {camera: Look.from_dict(look) for camera, look in values.get("looks", {}).items()},
        }
        return cls(Normalize(**quantiles), **plain)


def _either(one: Range | None, other: Range | None) -> Range | None:
    """What is in one range or in the other; None where nothing tells of either."""
    if one is None or other is None:
        return one or other
    return tuple(map(min, one[0], other[0])), tuple(map(max, one[1], other[1]))
