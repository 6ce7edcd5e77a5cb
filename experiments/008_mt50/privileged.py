"""How often MT50 is done by a policy that is told where things are, and by one that is told so with an error.

It sees the simulator's state instead of an image: hand, first two things, goal. It learns the demonstrations of
`pi05 collect --env MT50 --action_repeat 4` with a small MLP. What it cannot do is beyond 50 demonstrations
per task; what an error costs tells how well an image has to be read.

    python experiments/008_mt50/privileged.py --errors 0 0.007 0.015 0.03
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.sim.demonstrations.episodes import record_episode
from pi05_lightning.sim.metaworld.environment import MetaWorldEnvironment
from pi05_lightning.sim.metaworld.mt50 import MAX_SECONDS, MT50, SENTENCES
from pi05_lightning.sim.processes import simulator_processes
from pi05_lightning.sim.splits import split_seeds

TASKS = tuple(SENTENCES)
HAND, THING, GOAL = slice(0, 3), slice(4, 7), slice(18, 21)
STATE = 21  # hand 3, opening of the fingers 1, pose of two things 14, goal 3
EPISODES = 50


class Privileged(MetaWorldEnvironment):
    """It is seen by its state alone."""

    @property
    def state(self) -> np.ndarray:
        """Of MetaWorld's observation of 39 numbers, those of now."""
        return np.concatenate([self._obs[:18], self._obs[36:]]).astype(np.float32)


@dataclass(frozen=True)
class Told(MT50):
    """MT50 as a policy is told it."""

    state_names = tuple(f"{number}" for number in range(STATE))


def opened(task: str, action_repeat: int) -> Privileged:
    return Privileged(task, 16, ("corner2",), action_repeat, SENTENCES, {}, MAX_SECONDS)


def demonstrations(task: str, action_repeat: int) -> tuple[np.ndarray, np.ndarray]:
    """States f32[N STATE] and actions f32[N 4] of `EPISODES` episodes."""
    config = CollectConfig(Path(), env=Told(), action_repeat=action_repeat, answers_every=1000)
    with closing(opened(task, action_repeat)) as env:
        tried = (record_episode(env, seed, config) for seed in split_seeds("train", 4 * EPISODES))
        done = list(islice(filter(None, tried), EPISODES))
    return np.concatenate([e.state for e in done if e.state is not None]), np.concatenate([e.action for e in done])


@dataclass(frozen=True)
class Policy:
    """An action from a state f32[… STATE] and a task i64[…]."""

    mlp: nn.Module
    mean: Tensor
    std: Tensor

    def __call__(self, state: Tensor, task: Tensor) -> Tensor:
        hand, thing, goal = state[..., HAND], state[..., THING], state[..., GOAL]
        apart = torch.cat([thing - hand, goal - hand, goal - thing], -1) / 0.05  # experts go by 5 cm and less
        told = F.one_hot(task, len(TASKS)).float()
        return self.mlp(torch.cat([(state - self.mean) / self.std, apart, told], -1))


def trained(state: Tensor, task: Tensor, action: Tensor, steps: int) -> Policy:
    width = 512
    mlp = nn.Sequential(
        nn.Linear(STATE + 9 + len(TASKS), width),
        nn.GELU(),
        *(layer for _ in range(2) for layer in (nn.Linear(width, width), nn.GELU())),
        nn.Linear(width, 4),
    )
    policy = Policy(mlp, state.mean(0), state.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(mlp.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in tqdm(range(steps), desc="training"):
        rows = torch.randint(len(state), (512,))
        optimizer.zero_grad()
        F.l1_loss(policy(state[rows], task[rows]), action[rows]).backward()
        optimizer.step()
        schedule.step()
    return policy


def successes(task: str, policy: Policy, action_repeat: int, error: float, episodes: int) -> int:
    """Of the first held-out initial states; thing and goal are told beside where they are, the same all along."""
    torch.set_num_threads(1)
    done = 0
    number = torch.tensor(TASKS.index(task))
    with closing(opened(task, action_repeat)) as env, torch.inference_mode():
        for seed in split_seeds("rollout", episodes):
            env.reset(seed)
            off = torch.zeros(STATE)
            generator = torch.Generator().manual_seed(seed)
            off[THING], off[GOAL] = torch.randn(2, 3, generator=generator) * error
            decisions = range(round(MAX_SECONDS * env.fps))
            done += any(env.step(policy(torch.from_numpy(env.state) + off, number).numpy()) for _ in decisions)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--action_repeat", type=int, default=4, help="control steps of 1/80 s that an action lasts")
    parser.add_argument("--episodes", type=int, default=10, help="initial states of each task")
    parser.add_argument("--steps", type=int, default=12_000, help="of training")
    parser.add_argument("--errors", type=float, nargs="+", default=[0.0], help="standard deviation per axis, in metres")
    options = parser.parse_args()
    torch.manual_seed(0)
    with simulator_processes(2, MT50().warm_up) as pool:
        recorded = pool.map(partial(demonstrations, action_repeat=options.action_repeat), TASKS)
        states, actions = zip(*tqdm(recorded, desc="demonstrations", total=len(TASKS)), strict=True)
        task = torch.repeat_interleave(torch.tensor([len(state) for state in states]))
        state, action = (torch.from_numpy(np.concatenate(parts)) for parts in (states, actions))
        policy = trained(state, task, action, options.steps)
        for error in options.errors:
            count = partial(
                successes, policy=policy, action_repeat=options.action_repeat, error=error, episodes=options.episodes
            )
            done = dict(zip(TASKS, tqdm(pool.map(count, TASKS), total=len(TASKS)), strict=True))
            share = {name: fmean(done[task] for task in tasks) for name, tasks in MT50().groups().items()}
            macro = fmean(share.values()) / options.episodes
            total = options.episodes * len(TASKS)
            print(f"error {100 * error:g} cm: {sum(done.values())} of {total}, macro {macro:.2f}")


if __name__ == "__main__":
    main()
