"""`pi05 rollout`: closed-loop success on held-out initial states, beside baselines on the same states."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lightning.sim.environment import Environment, EnvironmentConfig, NoSuchEnvironment, View
from pi05_lightning.sim.lerobot_env import LeRobotEnv as LeRobotEnv  # known to --env by its name
from pi05_lightning.sim.libero import Libero as Libero
from pi05_lightning.sim.metaworld.environment import MetaWorld
from pi05_lightning.sim.processes import simulator_processes
from pi05_lightning.sim.trials import MODES, POLICY_MODES, Clock, Mode, Pace, Trial, run_baseline, run_policy

if TYPE_CHECKING:
    from pi05_lightning.policy import Pi05Policy


@dataclass(frozen=True)
class RolloutConfig:
    """What decides how an episode goes, apart from its mode, task and seed."""

    checkpoint: str
    dataset: str | None
    env: EnvironmentConfig
    view: View
    pace: Pace
    num_steps: int = 10
    noise_scale: float = 1.0
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """Trials that one process runs in lanes: one mode, one task."""

    config: RolloutConfig
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Done:
    """A job's trials, over, the seconds that they took in all, and those of every step."""

    trials: tuple[Trial, ...]
    seconds: float
    clock: Clock


def run_job(job: Job) -> Done:
    start, clock = perf_counter(), Clock()
    config, trials, mode = job.config, job.trials, job.trials[0].mode
    lanes = _environments(trials[0].task, config, len(trials) if mode in POLICY_MODES else 1)
    if mode in POLICY_MODES:
        policy = _policy(config.checkpoint, config.num_steps, config.noise_scale, config.device)
        run_policy(policy, list(zip(lanes, trials, strict=False)), config.pace, clock)
    else:
        replay = _mean_trajectory(config.dataset, lanes[0].sentence) if mode == "mean_replay" else None
        for trial in trials:
            run_baseline(lanes[0], trial, config.pace, clock, replay)
    return Done(trials, perf_counter() - start, clock)


# --- what a worker process keeps from job to job

_LANES: dict[str, list[Environment]] = {}


def _environments(task: str, config: RolloutConfig, count: int) -> list[Environment]:
    if not _LANES:
        Finalize(None, _close_lanes, exitpriority=10)  # before the interpreter goes, or EGL complains
    if task not in _LANES:
        _close_lanes()
        _LANES[task] = []
    while len(_LANES[task]) < count:
        _LANES[task].append(config.env.open(task, config.view))
    return _LANES[task]


def _close_lanes() -> None:
    while _LANES:
        for env in _LANES.popitem()[1]:
            env.close()


@cache
def _policy(checkpoint: str, num_steps: int, noise_scale: float, device: str) -> Pi05Policy:
    import torch

    from pi05_lightning.policy import Pi05Policy

    torch.set_num_threads(1)  # as many processes as cores
    return Pi05Policy.from_pretrained(checkpoint, num_steps=num_steps, noise_scale=noise_scale, device=device)


@cache
def _mean_trajectory(dataset: str, task: str) -> np.ndarray:
    from pi05_lightning.sim.baselines import mean_trajectory

    return mean_trajectory(Path(dataset), task)


# --- the command


def rollout(
    checkpoint: Path,
    tasks: list[str] | None = None,
    env: EnvironmentConfig = MetaWorld(),  # noqa: B008 - frozen
    episodes: int = 25,
    modes: tuple[Mode, ...] | None = None,
    out: Path | None = None,
    dataset: Path | None = None,
    execution_horizon: int | None = None,
    replan_subtask_every: int = 1,
    num_steps: int = 10,
    noise_scale: float = 1.0,
    max_seconds: float | None = None,
    videos: int = 1,
    lanes: int = 8,
    num_workers: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run a checkpoint in a simulator on initial states that it was never trained on, and compare.

    Args:
        checkpoint: a .ckpt file, a run's directory or an exported folder.
        tasks: the simulator's names of tasks; by default those that the checkpoint was trained on (MetaWorld), all of
            `--env.suites` (Libero), the default of the environment (LeRobotEnv).
        env: the simulator: MetaWorld, Libero, LeRobotEnv, or an EnvironmentConfig of your own by its import path.
        episodes: initial states per task, the same for every mode.
        modes: policy (the predicted subtask conditions the actions), flat (the task alone does), and the baselines
            mean_replay (mean training trajectory), random (uniform actions), expert (scripted; it sees the goal); by
            default all that the simulator and the data allow.
        out: folder for rollout.json, videos and frames; by default `rollout` beside the checkpoint.
        dataset: the demonstrations, for mean_replay; by default those named in the checkpoint.
        execution_horizon: actions of a chunk that are executed before the next is asked for; by default half.
        replan_subtask_every: chunks that a predicted subtask lasts.
        num_steps: Euler steps per chunk.
        noise_scale: of the noise that a chunk's flow starts from; 0 starts from its mean.
        max_seconds: simulated time after which an episode has failed; by default 6 in MetaWorld, LeRobot's in others.
        videos: episodes per task and policy mode that are filmed.
        lanes: episodes that a process steps together.
        num_workers: processes; by default one per core.
        seed: of the initial states and the noise.
        device: where the policy runs; the simulator is on the CPU, but for what it renders.

    Returns and writes {"success": {mode: {task: [successes, trials]}}, …}, see `sim.summary.summarise`.
    Raises ValueError for tasks, cameras and modes that the simulator does not have.
    """
    from rich.console import Console
    from tqdm import tqdm

    from pi05_lightning.sim import summary, video
    from pi05_lightning.weights.locate import locate

    if min(episodes, lanes) < 1:
        raise ValueError("episodes and lanes: at least 1")
    processor = locate(checkpoint).processor()
    horizon = processor.shapes.horizon
    if execution_horizon is not None and not 1 <= execution_horizon <= horizon:
        raise ValueError(f"execution_horizon: {execution_horizon} is not within 1 and the model's {horizon}")
    if not processor.acting:
        raise ValueError(f"{checkpoint} was trained on no robot's data: there is nothing to roll out")
    robot = processor.robots[processor.acting[0]]
    tasks = tasks or env.tasks(robot)
    demonstrations = dataset or Path(robot.dataset)
    config = RolloutConfig(
        checkpoint=str(checkpoint),
        dataset=str(demonstrations) if (demonstrations / "meta" / "tasks.parquet").is_file() else None,
        env=env,
        view=View(processor.cameras, processor.shapes.image_size, robot.fps),
        pace=Pace(execution_horizon or max(1, horizon // 2), replan_subtask_every, max_seconds, seed),
        num_steps=num_steps,
        noise_scale=noise_scale,
        device=device,
    )
    modes = available_modes(config, modes, processor.predicts_subtasks(processor.acting[0]))
    out = out or default_folder(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    jobs = list(plan(config, tasks, episodes, modes, lanes, videos))
    trials: list[Trial] = []
    clocks, seconds = {mode: Clock() for mode in modes}, dict.fromkeys(modes, 0.0)
    with (
        simulator_processes(num_workers or os.cpu_count() or 1) as pool,
        tqdm(total=len(tasks) * episodes * len(modes), unit="episode", desc="rollout") as bar,
    ):
        try:
            for done in pool.map(run_job, jobs):
                for trial in done.trials:
                    if trial.shots:
                        name = f"{trial.mode}-{trial.task.replace('/', '-')}-{trial.seed}.mp4"
                        video.write(out / name, trial, round(robot.fps))
                        trial.shots.clear()
                trials += done.trials
                clocks[done.trials[0].mode].add(done.clock)
                seconds[done.trials[0].mode] += done.seconds
                bar.update(len(done.trials))
        except NoSuchEnvironment as error:  # from another process, where its traceback helps nobody
            raise ValueError(str(error)) from error
    result = summary.summarise(trials, clocks) | {
        "process_seconds": {mode: round(value, 1) for mode, value in seconds.items()},
        "execution_horizon": config.pace.execution_horizon,
        "noise_scale": noise_scale,
        "env": str(env),
        "seed": seed,
        "checkpoint": config.checkpoint,
    }
    (out / "rollout.json").write_text(json.dumps(result, indent=2))
    Console().print(*summary.tables(result))
    return result


def default_folder(checkpoint: Path) -> Path:
    """`rollout` in the run's directory, wherever in it the checkpoint is."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "rollout"


def available_modes(config: RolloutConfig, wanted: Sequence[Mode] | None, subtasks: bool = True) -> tuple[Mode, ...]:
    """The wanted modes; by default all but those whose expert or demonstrations are not there.

    `flat` is left out too, unless it is wanted, where the policy predicts no subtasks: it acts on the task anyhow.

    Raises ValueError when such a one is wanted.
    """
    missing = {}
    if not config.env.has_expert:
        missing["expert"] = f"{type(config.env).__name__} has no scripted expert"
    if config.dataset is None:
        missing["mean_replay"] = "the demonstrations are not here: say where with --dataset"
    for mode in wanted or ():
        if mode in missing:
            raise ValueError(f"mode {mode}: {missing[mode]}, or leave the mode out")
    return tuple(wanted or (mode for mode in MODES if mode not in missing and (subtasks or mode != "flat")))


def plan(
    config: RolloutConfig, tasks: Sequence[str], episodes: int, modes: Sequence[Mode], lanes: int, videos: int
) -> Iterator[Job]:
    """Jobs, grouped by task so that environments are reused."""
    for number, task in enumerate(tasks):
        seeds = config.env.seeds(number, episodes, config.pace.seed)
        for mode in modes:
            films = videos if mode in POLICY_MODES else 0
            trials = [Trial(mode, task, seed, record=i < films) for i, seed in enumerate(seeds)]
            for first in range(0, episodes, lanes):
                yield Job(config, tuple(trials[first : first + lanes]))
