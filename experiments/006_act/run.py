"""ACT by LeRobot on the demo's demonstrations, rolled out on the initial states of `pi05 rollout`.

LeRobot decodes a video anew for every sample, and 001 trains on frames that it decoded once: so ACT gets a copy of the
dataset with single images, which costs it a third as much.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial
from itertools import batched, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from rich.console import Console

from pi05_lightning.acting import Acting
from pi05_lightning.acting.inference import Inference
from pi05_lightning.sim.baselines import Demonstrations, mean_trajectory, run_baseline
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import View
from pi05_lightning.sim.metaworld.environment import MetaWorld
from pi05_lightning.sim.metaworld.tasks import task_of_sentence
from pi05_lightning.sim.motion import run_policy
from pi05_lightning.sim.summary import summarise, tables
from pi05_lightning.sim.trials import Clock, Trial
from pi05_lightning.types import Frame

CONFIG = Path(__file__).with_name("train.yaml")
FEATURES = ("observation.images.topview", "observation.images.gripperPOV", "observation.state", "action")
LANES = 8


def data(source: Path) -> None:
    """Copy the training episodes of a dataset, each frame a PNG in its parquet files, without its language columns.

    Args:
        source: the demonstrations, a LeRobot dataset; the copy is put beside it.
    """
    target = with_images(source)
    if target.exists():
        return
    splits = json.loads((source / "meta" / "info.json").read_text())["splits"]
    first, last = map(int, splits["train"].split(":"))
    films = LeRobotDataset("pi05/demo", source, episodes=list(range(first, last)), video_backend="pyav")
    features = {name: {**films.features[name]} for name in FEATURES}
    for feature in features.values():
        feature["dtype"] = feature["dtype"].replace("video", "image")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy = LeRobotDataset.create("pi05/demo", films.fps, features, root=partial, use_videos=False)
    episodes = films.hf_dataset["episode_index"]
    for _, frames in groupby(range(len(films)), key=lambda index: int(episodes[index])):
        for index in frames:
            frame = films[index]
            images = {name: frame[name].movedim(0, -1) for name in FEATURES if "images" in name}
            copy.add_frame({**{name: frame[name] for name in FEATURES}, **images, "task": frame["task"]})
        copy.save_episode()
    copy.finalize()
    partial.rename(target)


def with_images(source: Path) -> Path:
    """Where a dataset's copy with images is."""
    return source.with_name(f"{source.name}_images")


def train(source: Path, run: Path, seed: int = 0, flags: tuple[str, ...] = ()) -> None:
    """Train with `lerobot-train`, on the copy with images.

    Args:
        source: the demonstrations, as given to `data`.
        run: directory of the seed; what LeRobot writes goes into its folder `lerobot`, and replaces what was there.
        seed: of the training.
        flags: further ones of `lerobot-train`, such as --steps=10.
    """
    paths = [f"--config_path={CONFIG}", f"--dataset.root={with_images(source)}", f"--output_dir={run / 'lerobot'}"]
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", *paths, f"--seed={seed}", *flags]
    shutil.rmtree(run / "lerobot", ignore_errors=True)  # from an interrupted training, which LeRobot would not replace
    subprocess.run(command, check=True)


class Act(Inference):
    """ACT as `run_policy` asks for chunks: a new one for every action."""

    hierarchical = False
    acting = Acting(hierarchical=hierarchical)

    def __init__(self, run: Path) -> None:
        checkpoint = run / "lerobot" / "checkpoints" / "last" / "pretrained_model"
        torch.set_num_threads(1)
        self.policy = ACTPolicy.from_pretrained(checkpoint)
        sizes = SimpleNamespace(horizon=self.policy.config.chunk_size, action_dim=1)
        self.model = cast("Any", SimpleNamespace(config=sizes))
        self.execution_horizon = self.acting.executed(self.policy.config.chunk_size)
        self.preprocess, self.postprocess = make_pre_post_processors(self.policy.config, str(checkpoint))

    def predict_chunks(self, frames: Sequence[Frame], *_: Any, **__: Any) -> np.ndarray:
        """f32[B T A], one chunk per frame."""
        batch = {"observation.state": torch.from_numpy(np.stack([np.asarray(f.state) for f in frames]))}
        for camera in frames[0].images:
            pixels = torch.from_numpy(np.stack([f.images[camera] for f in frames]))
            batch[f"observation.images.{camera}"] = pixels.float() / 255
        return self.postprocess(self.policy.predict_action_chunk(self.preprocess(batch))).numpy()


def rollout(source: Path, run: Path, episodes: int = 25, seed: int = 0) -> None:
    """Write rollout/rollout.json as `pi05 rollout` does: the same states, the same limits.

    The mode is `flat`: ACT is told neither task nor subtask. `mean_replay` shows that the states are the same.

    Args:
        source: the demonstrations, for the tasks and the mean trajectory.
        run: directory of the seed.
        episodes: initial states per task.
        seed: of the initial states.
    """
    policy, env, view = Act(run), MetaWorld(), view_of(source)
    results, clocks = [], {"flat": Clock(), "mean_replay": Clock()}
    replay = cache(partial(mean_trajectory, Demonstrations(str(source), ("action",))))
    for sentence in sorted(pd.read_parquet(source / "meta" / "tasks.parquet").index):
        task, states = task_of_sentence(sentence), env.seeds(episodes, seed)
        with ExitStack() as stack:
            lanes = [stack.enter_context(env.open(task, view)) for _ in range(min(LANES, episodes))]
            for some in batched(states, LANES):
                trials = [Trial("flat", task, state, noise_seed=seed) for state in some]
                courses = [Course(lane, trial) for lane, trial in zip(lanes, trials, strict=False)]
                run_policy(policy, courses, clocks["flat"])
                results += [course.result for course in courses]
            for state in states:
                course = Course(lanes[0], Trial("mean_replay", task, state, noise_seed=seed))
                run_baseline(course, clocks["mean_replay"], replay)
                results.append(course.result)
    result = summarise(results, clocks) | {"acting": {"flat": asdict(policy.acting)}, "env": str(env), "seed": seed}
    (run / "rollout").mkdir(exist_ok=True)
    (run / "rollout" / "rollout.json").write_text(json.dumps(result, indent=2))
    Console().print(*tables(result))


def view_of(source: Path) -> View:
    """What a policy of this dataset sees."""
    info = json.loads((source / "meta" / "info.json").read_text())
    cameras = [name for name in FEATURES if "images" in name]
    size = info["features"][cameras[0]]["shape"][0]
    return View(tuple(name.rpartition(".")[2] for name in cameras), size, info["fps"])


if __name__ == "__main__":
    auto_cli([data, train, rollout])
