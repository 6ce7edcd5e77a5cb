"""How often MT50 is done by the expert's actions where each is held as a policy holds it.

A demonstration's action is the mean of what the expert does in `action_repeat` control steps. Here every such mean is
known beforehand, as the expert acts once in a copy of the state, and is then held. What fails so is beyond a policy
that does what it was shown.

    python experiments/008_mt50/held_actions.py --action_repeat 4
"""

from __future__ import annotations

import argparse
import copy
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from pi05_lightning.sim.environment import View, act_as_expert
from pi05_lightning.sim.metaworld.environment import MetaWorldEnvironment
from pi05_lightning.sim.metaworld.mt50 import MAX_SECONDS, MT50, SENTENCES
from pi05_lightning.sim.processes import simulator_processes
from pi05_lightning.sim.sawyer import CONTROL_HZ
from pi05_lightning.sim.splits import split_seeds


def mean_of_expert(env: MetaWorldEnvironment) -> np.ndarray:
    """What the expert does in the time of one action, on average; the state is as before afterwards."""
    import mujoco

    simulator: Any = env._env
    whole = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(simulator.model, whole))
    mujoco.mj_getState(simulator.model, simulator.data, state, whole)
    kept = {name: copy.deepcopy(value) for name, value in vars(simulator).items() if _is_plain(value)}
    seen, taken = env._obs, list[np.ndarray]()
    act_as_expert(env, taken)
    mujoco.mj_setState(simulator.model, simulator.data, state, whole)
    mujoco.mj_forward(simulator.model, simulator.data)
    vars(simulator).update(kept)
    env._obs = seen
    return np.stack(taken).mean(0, dtype=np.float32)


def _is_plain(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | float | int)


def successes(task: str, action_repeat: int, episodes: int) -> int:
    """Of the first held-out initial states."""
    done = 0
    with closing(MT50().open(task, View(("corner2",), 16, CONTROL_HZ / action_repeat))) as env:
        for seed in split_seeds("rollout", episodes):
            env.reset(seed)
            done += any(env.step(mean_of_expert(env)) for _ in range(round(MAX_SECONDS * env.fps)))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--action_repeat", type=int, default=4, help="control steps of 1/80 s that an action lasts")
    parser.add_argument("--episodes", type=int, default=10, help="initial states of each task")
    options = parser.parse_args()
    count = partial(successes, action_repeat=options.action_repeat, episodes=options.episodes)
    with simulator_processes(2, MT50().warm_up) as pool:
        done = dict(zip(SENTENCES, tqdm(pool.map(count, SENTENCES), total=len(SENTENCES)), strict=True))
    for task, number in done.items():
        if number < options.episodes:
            print(f"{task}: {number} of {options.episodes}")
    print(f"all 50 tasks: {sum(done.values())} of {options.episodes * len(done)}")


if __name__ == "__main__":
    main()
