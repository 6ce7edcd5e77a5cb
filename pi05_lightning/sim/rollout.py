"""`pi05 rollout`: closed-loop success on held-out initial states, beside baselines on the same states.

Episodes run in lanes: a process steps several environments of one task together, so that the policy sees a batch. An
episode depends on its task, its seed and the checkpoint alone, not on the lane, the batch or the process it ran in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np

from pi05_lightning.sim.metaworld import CONTROL_HZ, MetaWorldEnv, split_seeds
from pi05_lightning.sim.processes import simulator_processes

Mode = Literal["policy", "flat", "mean_replay", "random", "expert"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class RolloutConfig:
    """What decides how an episode goes, apart from its mode, task and seed."""

    checkpoint: str
    dataset: str | None
    execution_horizon: int
    replan_subtask_every: int
    num_steps: int
    max_seconds: float
    action_repeat: int
    image_size: int
    cameras: tuple[str, ...]
    seed: int


@dataclass
class Trial:
    """One episode: how it ended, and what a video of it shows."""

    mode: Mode
    task: str
    seed: int
    record: bool = False
    success: bool = False
    decisions: int = 0
    reason: str = ""
    """Why it ended, when it was the policy's failure and not the task's end."""
    subtask: str | None = None
    images: list[np.ndarray] = field(default_factory=list)
    """u8[h w 3] per decision, all cameras side by side."""
    captions: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.mode} · {self.task}"


@dataclass(frozen=True)
class Job:
    """Trials that one process runs in lanes: one mode, one task."""

    config: RolloutConfig
    trials: tuple[Trial, ...]


def run_job(job: Job) -> tuple[list[Trial], float]:
    """The job's trials, finished, and the seconds that they took."""
    start = perf_counter()
    trials, config = list(job.trials), job.config
    mode, task = trials[0].mode, trials[0].task
    lanes = _environments(task, config, len(trials) if mode in ("policy", "flat") else 1)
    if mode in ("policy", "flat"):
        for env, trial in zip(lanes, trials, strict=False):
            env.reset(trial.seed)
        run_policy(list(zip(lanes, trials, strict=False)), config)
    else:
        for trial in trials:
            lanes[0].reset(trial.seed)
            run_baseline(lanes[0], trial, config)
    return trials, perf_counter() - start


def run_policy(running: list[tuple[MetaWorldEnv, Trial]], config: RolloutConfig) -> None:
    """Step environments together until each succeeds, fails or runs out of time."""
    policy = _policy(config.checkpoint, config.num_steps)
    limit = _max_decisions(config)
    chunk = 0
    while running:
        frames = [env.observation() for env, _ in running]
        if running[0][1].mode == "policy" and chunk % config.replan_subtask_every == 0:
            for (_, trial), subtask in zip(running, policy.predict_subtasks(frames), strict=True):
                trial.subtask = subtask
        actions = policy.predict_chunks(
            frames,
            [trial.subtask for _, trial in running],
            _noise([trial for _, trial in running], chunk, policy, config),
        )
        for (env, trial), plan in zip(running, actions, strict=True):
            if not np.isfinite(plan).all():
                trial.reason = "the policy's action is not finite"
                continue
            for action in plan[: config.execution_horizon]:
                advance(env, trial, action, limit)
                if trial.success or trial.decisions >= limit:
                    break
        running = [(e, t) for e, t in running if not (t.success or t.reason or t.decisions >= limit)]
        chunk += 1


def run_baseline(env: MetaWorldEnv, trial: Trial, config: RolloutConfig) -> None:
    """One episode of the scripted expert, of uniformly random actions, or of the mean training trajectory."""
    limit = _max_decisions(config)
    rng = np.random.default_rng([config.seed, trial.seed])
    replay = _mean_trajectory(config.dataset, env.language.sentence) if trial.mode == "mean_replay" else None
    while not trial.success and trial.decisions < limit:
        if trial.mode == "expert":
            for _ in range(env.action_repeat):
                trial.success |= env.control_step(env.expert_action())
            trial.decisions += 1
            continue
        action = rng.uniform(-1, 1, 4) if replay is None else replay[min(trial.decisions, len(replay) - 1)]
        advance(env, trial, action, limit)


def advance(env: MetaWorldEnv, trial: Trial, action: np.ndarray, limit: int) -> None:
    """One decision: hold the action, and note what a video needs."""
    trial.success = env.step(action)
    trial.decisions += 1
    if trial.record:
        trial.images.append(np.concatenate([image.transpose(1, 2, 0) for image in env.render().values()], axis=1))
        trial.captions.append(trial.subtask or env.language.sentence)


def _max_decisions(config: RolloutConfig) -> int:
    return round(config.max_seconds * CONTROL_HZ / config.action_repeat)


def _noise(trials: Sequence[Trial], chunk: int, policy: Any, config: RolloutConfig) -> Any:
    import torch

    shape = policy.model.config.horizon, policy.model.config.action_dim
    rngs = [np.random.Generator(np.random.Philox(key=[config.seed, (trial.seed << 12) + chunk])) for trial in trials]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


# --- what a worker process keeps from job to job

_LANES: dict[str, list[MetaWorldEnv]] = {}


def _environments(task: str, config: RolloutConfig, count: int) -> list[MetaWorldEnv]:
    if not _LANES:
        Finalize(None, _close_lanes, exitpriority=10)  # before the interpreter goes, or EGL complains
    if task not in _LANES:
        _close_lanes()
        _LANES[task] = []
    while len(_LANES[task]) < count:
        _LANES[task].append(MetaWorldEnv(task, config.image_size, config.cameras, config.action_repeat))
    return _LANES[task]


def _close_lanes() -> None:
    while _LANES:
        for env in _LANES.popitem()[1]:
            env.close()


@cache
def _policy(checkpoint: str, num_steps: int) -> Any:
    import torch

    from pi05_lightning.policy import Pi05Policy

    torch.set_num_threads(1)  # as many processes as cores
    return Pi05Policy.from_pretrained(checkpoint, num_steps=num_steps)


@cache
def _mean_trajectory(dataset: str, task: str) -> np.ndarray:
    from pi05_lightning.sim.baselines import mean_trajectory

    return mean_trajectory(Path(dataset), task)


# --- the command


def rollout(
    checkpoint: Path,
    tasks: list[str] | None = None,
    episodes: int = 25,
    modes: tuple[Mode, ...] = MODES,
    out: Path | None = None,
    dataset: Path | None = None,
    execution_horizon: int | None = None,
    replan_subtask_every: int = 1,
    num_steps: int = 10,
    max_seconds: float = 6.0,
    videos: int = 1,
    lanes: int = 8,
    num_workers: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run a checkpoint in MetaWorld on initial states that it was never trained on, and compare.

    Args:
        checkpoint: a .ckpt file, a run's directory or an exported folder.
        tasks: MetaWorld task names; by default those of the dataset that the checkpoint was trained on.
        episodes: initial states per task, the same for every mode.
        modes: policy (the predicted subtask conditions the actions), flat (the task alone does), and the baselines
            mean_replay (mean training trajectory), random (uniform actions), expert (scripted; it sees the goal).
        out: folder for rollout.json, videos and frames; by default `rollout` beside the checkpoint.
        dataset: the demonstrations, for mean_replay and the default tasks; by default the one named in the checkpoint.
        execution_horizon: actions of a chunk that are executed before the next is asked for; by default half.
        replan_subtask_every: chunks that a predicted subtask lasts.
        num_steps: Euler steps per chunk.
        max_seconds: simulated time after which an episode has failed.
        videos: episodes per task and policy mode that are filmed.
        lanes: episodes that a process steps together.
        num_workers: processes; by default one per core.
        seed: of the initial states and the noise.

    Returns and writes {"success": {mode: {task: [successes, trials]}}, …}.
    """
    from rich.console import Console
    from tqdm import tqdm

    from pi05_lightning.checkpoint import load
    from pi05_lightning.report.tables import success_table
    from pi05_lightning.sim import video
    from pi05_lightning.sim.tasks import task_of_sentence

    _, processor = load(checkpoint)
    robot = next(iter(processor.robots.values()))
    tasks = tasks or [task_of_sentence(sentence) for sentence in robot.tasks]
    demonstrations = dataset or Path(robot.dataset)
    config = RolloutConfig(
        checkpoint=str(checkpoint),
        dataset=str(demonstrations) if demonstrations.is_dir() else None,
        execution_horizon=execution_horizon or max(1, processor.shapes.horizon // 2),
        replan_subtask_every=replan_subtask_every,
        num_steps=num_steps,
        max_seconds=max_seconds,
        action_repeat=round(CONTROL_HZ / robot.fps),
        image_size=processor.shapes.image_size,
        cameras=processor.cameras,
        seed=seed,
    )
    out = out or default_folder(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    jobs = list(plan(config, tasks, episodes, modes, lanes, videos))
    workers = num_workers or os.cpu_count() or 1
    finished: list[Trial] = []
    seconds = dict.fromkeys(modes, 0.0)
    with (
        simulator_processes(workers) as pool,
        tqdm(total=len(tasks) * episodes * len(modes), unit="episode", desc="rollout") as bar,
    ):
        for trials, elapsed in pool.map(run_job, jobs):
            for trial in trials:
                if trial.images:
                    video.write(out / f"{trial.mode}-{trial.task}-{trial.seed}.mp4", trial, round(robot.fps))
                    trial.images.clear()
            finished += trials
            seconds[trials[0].mode] += elapsed
            bar.update(len(trials))
    result = summarise(finished, seconds, config)
    (out / "rollout.json").write_text(json.dumps(result, indent=2))
    Console().print(success_table(result["success"]))
    return result


def default_folder(checkpoint: Path) -> Path:
    """`rollout` in the run's directory, wherever in it the checkpoint is."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "rollout"


def plan(
    config: RolloutConfig, tasks: Sequence[str], episodes: int, modes: Sequence[Mode], lanes: int, videos: int
) -> Iterator[Job]:
    """Jobs, grouped by task so that environments are reused."""
    for number, task in enumerate(tasks):
        seeds = split_seeds("rollout", episodes, config.seed, start=number * episodes)
        for mode in modes:
            if mode == "mean_replay" and config.dataset is None:
                continue
            films = videos if mode in ("policy", "flat") else 0
            trials = [Trial(mode, task, seed, record=i < films) for i, seed in enumerate(seeds)]
            for first in range(0, episodes, lanes):
                yield Job(config, tuple(trials[first : first + lanes]))


def summarise(trials: Sequence[Trial], seconds: Mapping[Mode, float], config: RolloutConfig) -> dict[str, Any]:
    """Success by mode and task, failures with a reason, and process seconds per mode."""
    success: dict[str, dict[str, list[int]]] = {}
    for trial in trials:
        counts = success.setdefault(trial.mode, {}).setdefault(trial.task, [0, 0])
        counts[0] += trial.success
        counts[1] += 1
    return {
        "success": success,
        "crashed": [f"{t.mode} {t.task} seed {t.seed}: {t.reason}" for t in trials if t.reason],
        "process_seconds": {mode: round(value, 1) for mode, value in seconds.items() if mode in success},
        "execution_horizon": config.execution_horizon,
        "max_seconds": config.max_seconds,
        "checkpoint": config.checkpoint,
    }
