"""What a simulator gives a policy, seen in a few episodes' beginnings before any is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import cast

import numpy as np
from tqdm import tqdm

from pi05_lightning.data.looks import Look
from pi05_lightning.data.observation import check_image
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.transforms import Normalize, Quantiles
from pi05_lightning.evaluation.agreement import Counterpart, Finding, agreement
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.sim.environment import Demonstrator, EnvironmentConfig, NoSuchEnvironment, View, act_as_expert
from pi05_lightning.sim.rollout import view_of
from pi05_lightning.types import Frame
from pi05_lightning.weights.abilities import Abilities

TASKS, EPISODES = 4, 2
EXPERT_STEPS, BETWEEN = 60, 6
"""Steps that an expert, where there is one, shows of an episode, and from one look to the next."""


def beside_simulator(
    policy: Robot,
    abilities: Abilities,
    horizon: int,
    env: EnvironmentConfig,
    tasks: Sequence[str],
    view: View,
    expert: bool = True,
) -> list[Finding]:
    """What there is to say of a policy and a simulator; horizon: actions of a chunk.  The others as `glimpse`."""
    try:
        counterpart = glimpse(env, tasks, view, expert)
    except NoSuchEnvironment as error:
        return [Finding("simulator", "differs", given=str(error), then="no rollout can be run")]
    return agreement(policy, abilities, horizon, counterpart)


def differences(policy: Pi05Policy, env: EnvironmentConfig, tasks: Sequence[str]) -> list[Finding]:
    """What the simulator gives otherwise than the policy expects, by a look at the beginning of a few episodes."""
    view = view_of(policy)
    expected = replace(policy.processor.robots[policy.robot], cameras=view.cameras)
    found = beside_simulator(expected, policy.abilities, policy.horizon, env, tasks, view, expert=False)
    return [finding for finding in found if finding.verdict == "differs"]


def glimpse(config: EnvironmentConfig, tasks: Sequence[str], view: View, expert: bool = True) -> Counterpart:
    """Observations of some tasks' initial states, and of what an expert makes of them; no policy acts.

    expert: whether one, if there is any, shows some of each episode, which takes seconds.
    Raises NoSuchEnvironment as `EnvironmentConfig.open` and `Environment.observation`, ValueError for what is no image.
    """
    frames: list[Frame] = []
    expert = expert and config.has_expert
    sentences: dict[str, None] = {}
    bounds, fps = Quantiles(np.zeros(0), np.zeros(0)), view.fps
    chosen = tasks[:TASKS]
    with tqdm(total=len(chosen) * EPISODES, unit="episode", desc="looking") as bar:
        for task in chosen:
            with closing(config.open(task, view)) as env:
                sentences[env.sentence] = None
                bounds, fps = Quantiles(env.action_low, env.action_high), env.fps
                for start in config.seeds(EPISODES, seed=0):
                    env.reset(start)
                    frames.append(env.observation())
                    if expert:
                        frames += shown_by_expert(cast("Demonstrator", env))
                    bar.update()
    for frame in frames:
        for camera, image in frame.images.items():
            check_image(f"image {camera!r} of {type(config).__name__}", image)
    states = np.stack([frame.state for frame in frames if frame.state is not None] or [np.zeros(0, np.float32)])
    state = Quantiles(np.quantile(states, 0.01, axis=0), np.quantile(states, 0.99, axis=0))
    looks = {camera: Look.of(frame.images[camera] for frame in frames) for camera in frames[0].images}
    robot = Robot(
        Normalize(state, bounds),
        fps,
        tuple(sentences),
        cameras=tuple(frames[0].images),
        looks={camera: look for camera, look in looks.items() if look is not None},
    )
    return Counterpart(robot, type(config).__name__, bounds=True, resting=not expert, sets_rate=config.sets_rate)


def shown_by_expert(env: Demonstrator) -> Iterator[Frame]:
    """Some of what is seen while the expert acts."""
    for step in range(1, EXPERT_STEPS + 1):
        if env.ended:
            return
        act_as_expert(env)
        if step % BETWEEN == 0:
            yield env.observation()
