"""What a server says about the policy behind it, and the actions of its answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi05_lightning.serving.client.connection import ServerError


@dataclass(frozen=True)
class Served:
    """A policy as its server's metadata describe it; of openpi's own server mostly unknown.

    fps                 actions per second; None: unknown
    execution_horizon   actions that are executed of a chunk before the next one is asked for; None: unknown
    given               the most actions that a chunk can be told and goes on from: 0 without real-time chunking
    action_dim          None: unknown
    has_episodes        whether `reset` in an observation begins one
    said                all that it says of itself: another policy says otherwise
    """

    fps: float | None
    execution_horizon: int | None
    given: int
    action_dim: int | None
    has_episodes: bool
    said: str = field(default="", repr=False)

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Served:
        acting = metadata.get("acting") or {}
        goes_on = acting.get("rtc", False) and acting.get("actions", "flow") == "flow"
        return cls(
            fps=metadata.get("fps"),
            execution_horizon=metadata.get("action_horizon") if acting else None,
            given=acting.get("inference_delay", 0) if goes_on else 0,
            action_dim=metadata.get("action_dim"),
            has_episodes=metadata.get("policy") == "pi05_lightning",
            said=repr(metadata),
        )

    def actions(self, answer: dict[str, Any]) -> np.ndarray:
        """The chunk f32[T A] of an answer. Raises ServerError for what cannot be executed."""
        actions = np.asarray(answer.get("actions"))
        if actions.dtype.kind not in "fiu" or actions.ndim != 2 or not len(actions):
            raise ServerError(f"the answer holds no actions [T A]: `actions` is {actions.dtype}{list(actions.shape)}")
        if self.action_dim not in (None, actions.shape[1]):
            raise ServerError(f"the answer has {actions.shape[1]} action dimensions, not {self.action_dim}")
        if not np.isfinite(actions).all():
            raise ServerError("the answer has actions that are not finite")
        return actions.astype(np.float32)
