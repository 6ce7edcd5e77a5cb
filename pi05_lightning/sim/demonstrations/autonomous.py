"""Records a policy's own episodes, successes and failures, as a LeRobot v3 dataset; an expert may take over.

The policy acts as in a rollout (`sim.rollout`). Every action is a frame: what was seen before it, and what was done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import batched, groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pi05_lightning.acting import Acting
from pi05_lightning.acting.device import check_device
from pi05_lightning.data.attempts import COLLECTED
from pi05_lightning.files.local import write_json
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.sim.demonstrations.episodes import Episode, filmed, stacked
from pi05_lightning.sim.demonstrations.kept import Kept
from pi05_lightning.sim.demonstrations.lerobot_writer import (
    Recording,
    video_path,
    write_dataset,
)
from pi05_lightning.sim.environment import DemonstratorConfig, NoSuchEnvironment, check_tasks, tasks_to_run
from pi05_lightning.sim.rollout import Done, Job, Plan, Worker, run_in_processes, view_of
from pi05_lightning.sim.splits import EXPERIENCE
from pi05_lightning.sim.trials import Result, Trial
from pi05_lightning.weights.locate import locate, pinned

log = logging.getLogger(__name__)


def record_policy(root: Path, config: CollectConfig) -> None:
    """Make the dataset `root`: training episodes first, then validation episodes.

    Beside what demonstrations have: `intervention` per frame, whether the expert acted; in meta/episodes `success`,
    `end_reason` (success, or why not), `corrected` and `seed`; in `COLLECTED` the policy, the hash of its weights, and
    how it acted.  Raises ValueError for tasks and cameras that the simulator does not have, and for a policy that does
    not act at all.
    """
    assert config.policy is not None
    check_device(config.device)
    config.env.warm_up()  # what is missing shows before the weights are read
    checkpoint = pinned(config.policy)
    policy_hash = locate(checkpoint).content_hash()
    policy = Pi05Policy.from_pretrained(checkpoint, **asdict(Acting.of(config.acting)))
    view, robot, acting = view_of(policy), policy.processor.robots[policy.robot], policy.resolved
    if view.fps != round(view.fps):
        raise NoSuchEnvironment(f"policy: it acts {view.fps:g} times a second, and a dataset needs a whole number")
    tasks = tasks_to_run(config.env, config.tasks, robot)
    check_tasks(config.env, tasks)
    trials = _trials(config, tasks)
    if (states := config.env.num_states) is not None:
        left = states - config.episodes - config.val_episodes
        log.warning("a task has %d initial states: a rollout of at most %d episodes begins in others", states, left)
    worker = Worker(config.env, view, str(checkpoint), {"policy": acting}, config.device)
    arm = config.env if isinstance(config.env, DemonstratorConfig) else None
    if arm is not None and robot.state_dim != len(arm.state_names):
        arm = None  # the policy sees another state
    what = Recording(
        config.out.name,
        view.cameras,
        view.image_size,
        round(view.fps),
        arm.state_names if arm else [f"state_{dim}" for dim in range(robot.state_dim)],
        arm.action_names if arm else [f"action_{dim}" for dim in range(robot.action_dim)],
        arm.robot if arm else type(config.env).__name__.lower(),
        of_a_policy=True,
    )
    del policy  # maybe gigabytes: every process loads its own
    meant = replace(config, policy=checkpoint.resolve(), tasks=tuple(tasks), acting=asdict(acting))
    write_dataset(root, what, _blocks(Kept(root, meant, policy_hash), what, worker, trials, config))
    provenance = {
        "policy": str(config.policy),
        "sha256": policy_hash,
        "acting": asdict(acting),
        "env": str(config.env),
        "corrections": config.corrections,
        "seed": config.seed,
    }
    write_json(root / COLLECTED, provenance)


def _trials(config: CollectConfig, tasks: Sequence[str]) -> list[Trial]:
    """The training episodes of every task, then the validation episodes."""
    episodes = config.episodes + config.val_episodes
    plan = Plan(config.env, tasks, ("policy",), episodes, EXPERIENCE, max_seconds=config.max_seconds, seed=config.seed)
    trials = (replace(t, keeps=True, patience=config.corrections) for job in plan.jobs() for t in job.trials)
    return sorted(trials, key=lambda trial: trial.number >= config.episodes)


def _blocks(
    kept: Kept, what: Recording, worker: Worker, trials: Sequence[Trial], config: CollectConfig
) -> Iterator[tuple[str, list[Episode]]]:
    """The episodes, with their films, in blocks of a task.

    An attempt in which nothing was done is none, nor is one that the simulator broke off.
    """
    refused: list[str] = []
    begun, films = 0, 0  # of the trials

    def part(trial: Trial) -> tuple[str, bool]:
        return trial.task, trial.number >= config.episodes

    def recorded(_: int) -> Iterator[tuple[list[Episode], list[str]]]:
        """Of the trials from number `begun` on: thin episodes, and why there is nothing of the others."""
        jobs = [Job(some) for _, own in groupby(trials[begun:], part) for some in batched(own, config.lanes)]
        with closing(run_in_processes(worker, jobs, config.num_workers)) as over:
            for results in _in_order(over):
                episodes = [episode_of(result, what.cameras) for result in results if result.steps]
                if episodes:
                    videos = {camera: video_path(kept.folder, camera, films) for camera in what.cameras}
                    episodes = filmed(episodes, videos, what.fps)
                idle = [result for result in results if not result.steps]
                yield episodes, [f"{r.trial.task} (seed {r.trial.seed}): {r.reason}" for r in idle]

    with tqdm(total=len(trials), unit="episode") as bar:
        for episodes, reasons in kept.continued("attempts", recorded):
            split = "val" if part(trials[begun])[1] else "train"
            begun += len(episodes) + len(reasons)
            refused += reasons
            if episodes:
                yield split, episodes
                films += 1
            bar.update(len(episodes) + len(reasons))
    if refused:
        said = f"there is nothing of {refused[0]}"
        if len(refused) == len(trials):
            raise ValueError(said)
        log.warning("%d of %d attempts are left out: %s", len(refused), len(trials), said)


def _in_order(over: Iterable[tuple[int, Done]]) -> Iterator[list[Result]]:
    """The jobs' results by the jobs' numbers, as a dataset has its episodes."""
    early, due = dict[int, list[Result]](), 0
    for number, done in over:
        early[number] = done.results
        while due in early:
            yield early.pop(due)
            due += 1


def episode_of(result: Result, cameras: Sequence[str]) -> Episode:
    """A trial that is over, as it is recorded."""
    steps = result.steps
    state, images = stacked([step.frame for step in steps], cameras)
    return Episode(
        task=steps[0].frame.task,
        state=state,
        action=np.stack([step.action for step in steps]),
        images=images,
        subtasks=[step.subtask for step in steps],
        answers=[()] * len(steps),
        intervention=np.array([step.is_correction for step in steps]),
        outcome={
            "success": result.success,
            "end_reason": result.outcome,
            "corrected": result.corrected,
            "seed": result.trial.seed,
        },
    )
