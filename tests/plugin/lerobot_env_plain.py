"""An environment of LeRobot's own kind, as its plugins are: a point on a plain, seen by two cameras, to be moved up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

HEIGHT, WIDTH, STEPS = 48, 64, 12


class Plain(gym.Env):
    """`rewards` are of the episode so far; it is solved where the point has gone far enough."""

    metadata = {"render_fps": 10}  # noqa: RUF012 - gymnasium's
    task = task_description = "open the drawer"
    _max_episode_steps = STEPS
    action_space = gym.spaces.Box(-10, 20, (2,), np.float32)
    image_space = gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    observation_space = gym.spaces.Dict(
        {
            "pixels": gym.spaces.Dict({"top": image_space, "wrist": image_space}),
            "agent_pos": gym.spaces.Box(-100, 100, (3,), np.float64),
        }
    )

    def __init__(self, render_mode: str = "rgb_array") -> None:
        self.render_mode = render_mode

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.at, self.rewards = self.np_random.uniform(-0.2, 0.2, 3), list[float]()
        return self._seen(), {"is_success": False}

    def _seen(self) -> dict[str, Any]:
        row, column = (int(x) % side for x, side in zip(40 * self.at[:2] + 20, (HEIGHT, WIDTH), strict=True))
        images = {name: np.full((HEIGHT, WIDTH, 3), shade, np.uint8) for name, shade in (("top", 40), ("wrist", 90))}
        for image in images.values():
            image[row : row + 8, column : column + 8] = 255
        return {"pixels": images, "agent_pos": self.at.copy()}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.at[:2] += 0.05 * np.asarray(action, np.float64)
        self.rewards.append(float(self.at[0] + self.at[1]))
        success = self.rewards[-1] > 4
        return self._seen(), self.rewards[-1], success, False, {"is_success": success}

    def render(self) -> np.ndarray:
        return self._seen()["pixels"]["top"]


gym.register("lerobot_env_plain/plain", Plain, max_episode_steps=STEPS)


@EnvConfig.register_subclass("plain")
@dataclass
class PlainEnv(EnvConfig):
    task: str | None = "plain"
    fps: int = 10
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (3,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (HEIGHT, WIDTH, 3)),
            "pixels/wrist": PolicyFeature(FeatureType.VISUAL, (HEIGHT, WIDTH, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels/top": "observation.images.top",
            "pixels/wrist": "observation.images.wrist",
        }
    )

    @property
    def gym_id(self) -> str:
        return "lerobot_env_plain/plain"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}
