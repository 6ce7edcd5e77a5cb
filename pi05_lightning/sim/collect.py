"""`pi05 collect`: demonstrations of MetaWorld's scripted experts as a LeRobot v3 dataset, with language from the truth.

Episodes are made in blocks. A block is a pure function of (task, split, seed, its number), so the number of
processes changes nothing but the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi05_lightning.sim import questions
from pi05_lightning.sim.metaworld import (
    ACTION_NAMES,
    CONTROL_HZ,
    POLICY_CAMERAS,
    STATE_NAMES,
    MetaWorldEnv,
    split_seeds,
    task_names,
)
from pi05_lightning.types import Answer

DEMO_TASKS = ("reach-v3", "window-open-v3", "drawer-open-v3", "button-press-topdown-v3")
_SPLITS = ("train", "val")
_ATTEMPTS = 4  # initial states at hand per episode wanted; experts solve nearly all
_PUSH_STEPS = 5  # control steps of the longest push
_PUSH_CHANCE = 0.3  # per frame of a perturbed episode


@dataclass(frozen=True)
class Recipe:
    """What decides an episode's content, apart from its task and seed."""

    image_size: int
    cameras: tuple[str, ...]
    action_repeat: int
    noise_share: float
    max_frames: int
    tail_frames: int
    answers_every: int
    seed: int


@dataclass(frozen=True)
class _BlockSpec:
    task: str
    split: str
    number: int
    episodes: int
    recipe: Recipe
    root: Path
    index: int


def collect(
    out: Path,
    tasks: Sequence[str] = DEMO_TASKS,
    episodes: int = 300,
    val_episodes: int = 10,
    seed: int = 0,
    image_size: int = 64,
    cameras: Sequence[str] = POLICY_CAMERAS,
    action_repeat: int = 5,
    noise_share: float = 0.5,
    answers_every: int = 1,
    vision_text_frames: int = 2000,
    max_frames: int = 60,
    tail_frames: int = 2,
    block_size: int = 25,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `out`."""
    from tqdm import tqdm

    from pi05_lightning.sim.lerobot_writer import image_key, write_dataset

    out = Path(out)
    if CONTROL_HZ % action_repeat:
        raise ValueError(f"action_repeat {action_repeat} does not divide MetaWorld's {CONTROL_HZ} Hz: use 1, 2, 4, 5, 8, 10 or 16")
    unknown = sorted(set(tasks) - set(task_names()))
    if unknown:
        raise ValueError(f"MetaWorld has no task {', '.join(unknown)}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} already exists. Choose another directory or set overwrite: true.")
    root = out.with_name(f".{out.name}.partial")
    shutil.rmtree(root, ignore_errors=True)
    recipe = Recipe(image_size, tuple(cameras), action_repeat, noise_share, max_frames, tail_frames, answers_every, seed)
    specs = []
    for split, count in zip(_SPLITS, (episodes, val_episodes), strict=True):
        for task in tasks:
            for number, first in enumerate(range(0, count, block_size)):
                specs.append(_BlockSpec(task, split, number, min(block_size, count - first), recipe, root / "robot", len(specs)))
    fps = CONTROL_HZ // action_repeat
    features = {image_key(name): {"dtype": "video", "shape": (image_size, image_size, 3), "names": ["height", "width", "channels"]} for name in cameras}
    features["observation.state"] = {"dtype": "float32", "shape": (4,), "names": list(STATE_NAMES)}
    features["action"] = {"dtype": "float32", "shape": (4,), "names": list(ACTION_NAMES)}
    n_train, n_val = episodes * len(tasks), val_episodes * len(tasks)
    splits = {"train": f"0:{n_train}", "val": f"{n_train}:{n_train + n_val}"}
    root.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers or os.cpu_count(), mp_context=context) as pool, tqdm(total=n_train + n_val, unit="episode") as bar:
        def blocks():
            for block in pool.map(_make_block, specs):
                bar.update(len(block.episodes))
                yield block
        write_dataset(root / "robot", out.name, features, fps, blocks(), splits)
    if out.exists():
        shutil.rmtree(out)
    (root / "robot").rename(out)
    shutil.rmtree(root)
    return out


_ENV: dict[tuple, MetaWorldEnv] = {}


def _environment(task: str, recipe: Recipe) -> MetaWorldEnv:
    if task not in _ENV:
        for env in _ENV.values():
            env.close()
        _ENV.clear()
        _ENV[task] = MetaWorldEnv(task, recipe.image_size, recipe.cameras, recipe.action_repeat)
    return _ENV[task]


def _make_block(spec: _BlockSpec):
    from pi05_lightning.sim.lerobot_writer import write_videos

    env = _environment(spec.task, spec.recipe)
    count = spec.episodes * _ATTEMPTS
    seeds = split_seeds(spec.split, count, spec.recipe.seed, start=spec.number * count)
    made = []
    for seed in seeds:
        episode = record_episode(env, seed, spec.recipe)
        if episode is not None:
            made.append(episode)
        if len(made) == spec.episodes:
            return write_videos(spec.root, spec.index, made, CONTROL_HZ // spec.recipe.action_repeat)
    raise ValueError(f"the expert of {spec.task} solved {len(made)} of {count} initial states, {spec.episodes} are needed")


def record_episode(env: MetaWorldEnv, seed: int, recipe: Recipe):
    """The expert from one initial state, or None where it fails."""
    from pi05_lightning.sim.lerobot_writer import Episode

    rng = np.random.default_rng([recipe.seed, seed, zlib.crc32(env.task.encode())])
    noisy = rng.random() < recipe.noise_share
    env.reset(seed)
    states, actions, images, subtasks, answers = [], [], {name: [] for name in recipe.cameras}, [], []
    tail = 0
    while tail <= recipe.tail_frames and len(states) < recipe.max_frames:
        for name, image in env.render().items():
            images[name].append(image.transpose(1, 2, 0))
        answers.append(questions.answers(env) if len(states) % recipe.answers_every == 0 else ())
        subtasks.append(env.subtask())
        states.append(env.state)
        done, taken = tail > 0, []
        for _ in range(recipe.action_repeat):
            taken.append(env.expert_action())
            done |= env.control_step(taken[-1])
        actions.append(np.mean(taken, 0))
        tail += done
        if noisy and not done and rng.random() < _PUSH_CHANCE:
            push = np.append(rng.uniform(-1, 1, 3), taken[-1][3])
            for _ in range(rng.integers(1, _PUSH_STEPS + 1)):
                env.control_step(push)
    if not tail:
        return None
    stacked = {name: np.stack(frames) for name, frames in images.items()}
    return Episode(env.language.sentence, np.stack(states), np.stack(actions).astype(np.float32), stacked, subtasks, answers)
