"""The smallest environment, and a policy for it that does as it is told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from pi05_lightning.acting import Acting
from pi05_lightning.acting.inference import Inference
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import Environment
from pi05_lightning.sim.motion import run_policy
from pi05_lightning.sim.trials import Clock, Result, Trial
from pi05_lightning.types import Frame

HORIZON = 4


class Walk:
    """A number that actions are added to: solved at 1, over at -1."""

    sentence, fps, max_seconds = "reach one", 10.0, 2.0
    action_low, action_high = np.array([-0.5]), np.array([0.5])

    def reset(self, seed: int) -> None:
        self.at, self.seed, self.ended = 0.0, seed, False

    def observation(self) -> Frame:
        image = np.full((3, 8, 8), self.seed, np.uint8)
        return Frame({"top": image}, task=self.sentence, state=np.array([self.at, self.seed], np.float32))

    def step(self, action: np.ndarray) -> bool:
        self.at += float(action[0])
        self.ended = self.at <= -1
        return self.at >= 1

    def close(self) -> None: ...


class Stub(Inference):
    """A policy whose actions are `act(seed)`, everywhere the same; `calls` are the seeds it was asked for together."""

    hierarchical, action_dim = True, 1
    model = SimpleNamespace(config=SimpleNamespace(horizon=HORIZON, action_dim=1))

    def __init__(self, act, **acting) -> None:
        self.acting = Acting(**acting)
        self.execution_horizon = self.acting.executed(HORIZON)
        self.act, self.calls, self.noise, self.drawn = act, [], [], []

    def predict_subtasks(self, frames, generator=None):
        return [f"subtask {frame.state[0]:.1f}" for frame in frames]

    def predict_chunks(self, frames, subtasks, noise, prefix_actions=None, generator=None):
        self.calls.append([int(frame.state[1]) for frame in frames])
        self.noise.append(noise)
        self.drawn.append([row.initial_seed() for row in generator])
        return [self.act(int(frame.state[1])) for frame in frames]


def result_of(policy: Inference, env: Environment, trial: Trial, sentence: str | None = None) -> Result:
    """One episode, over."""
    course = Course(env, trial, sentence)
    run_policy(policy, [course], Clock())
    return course.result


def chunk(value: float) -> np.ndarray:
    return np.full((HORIZON, 1), value, np.float32)
