"""Closed-loop episodes: planned, cut into jobs, and run here or in processes of their own.

A job is a policy or a baseline at one task. What runs it keeps policy and environments for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import batched, product
from multiprocessing.util import Finalize
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING

from pi05_lightning.files.cores import available_cores
from pi05_lightning.files.ranges import check_range, check_unique
from pi05_lightning.sim.baselines import Demonstrations, mean_trajectory, run_baseline
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import (
    Environment,
    EnvironmentConfig,
    NoSuchEnvironment,
    View,
    same_rate,
)
from pi05_lightning.sim.instructions import Instruction, paraphrase
from pi05_lightning.sim.modes import DELAYED, POLICY_MODES, Mode
from pi05_lightning.sim.motion import run_policy
from pi05_lightning.sim.processes import simulator_processes
from pi05_lightning.sim.trials import Clock, Result, Trial

if TYPE_CHECKING:  # processes that run baselines alone need no model
    from pi05_lightning.acting import Acting
    from pi05_lightning.acting.inference import Inference
    from pi05_lightning.policy import Pi05Policy


@dataclass(frozen=True)
class Job:
    """Trials of one mode and one task, run in lanes: as many environments as trials, stepped together."""

    trials: tuple[Trial, ...]

    @property
    def mode(self) -> Mode:
        return self.trials[0].mode

    @property
    def task(self) -> str:
        return self.trials[0].task


@dataclass(frozen=True)
class Done:
    """A job that is over: the results in the order of its trials, and what they took."""

    results: list[Result]
    clock: Clock


@dataclass(frozen=True)
class Plan:
    """Which episodes are run: of every task the same initial states in every mode."""

    env: EnvironmentConfig
    tasks: Sequence[str]
    modes: Sequence[Mode]
    episodes: int
    split: str = "rollout"
    films: int = 0
    """Episodes per task and policy mode that are filmed, and one that fails."""
    lanes: int = 8
    """Episodes that are stepped together."""
    max_seconds: float | None = None
    seed: int = 0
    delays: tuple[int, ...] = ()
    """Actions that are executed while a chunk is computed, in the modes that have a delay: one is drawn for each."""
    instructions: Sequence[Instruction] = ("right",)
    """What the policy is told, one after the other in each of its modes."""
    swaps: Mapping[str, str] = field(default_factory=dict)
    """task -> the one whose instruction is given as `swapped`."""

    def __post_init__(self) -> None:
        if not self.instructions:
            raise ValueError("instructions: name at least one, such as right")
        chains = [task for task in self.tasks if self.env.is_chain(task)]
        if chains and {*self.instructions} != {"right"}:
            raise ValueError(f"instructions: {chains[0]} gives its own, one after the other: run it by itself")
        for delay in self.delays:
            check_range("delays", delay, 0)
        for name, values in {"tasks": self.tasks, "modes": self.modes, "instructions": self.instructions}.items():
            check_unique(name, values)
        check_range("episodes", self.episodes, 1)
        check_range("videos", self.films, 0)
        check_range("seed", self.seed, 0)
        check_range("lanes", self.lanes, 1)

    def jobs(self, without: Callable[[Trial], bool] = lambda trial: False) -> Iterator[Job]:
        """Grouped by task so that environments are reused.  without: trials that are left out."""
        seeds = self.env.seeds(self.episodes, self.seed, self.split)
        for task in self.tasks:
            for mode, instruction in product(self.modes, self.instructions):
                if mode not in POLICY_MODES and instruction != self.instructions[0]:
                    continue  # baselines hear nothing
                trials = (self._trial(mode, instruction, task, seed, i) for i, seed in enumerate(seeds))
                yield from map(Job, batched((trial for trial in trials if not without(trial)), self.lanes))

    def _trial(self, mode: Mode, instruction: Instruction, task: str, seed: int, number: int) -> Trial:
        acts = mode in POLICY_MODES
        return Trial(
            mode,
            task,
            seed,
            films="none" if not (acts and self.films) else "all" if number < self.films else "failure",
            max_seconds=self.max_seconds,
            noise_seed=self.seed,
            delays=self.delays if mode in DELAYED else (),
            number=number,
            instruction=instruction if acts else "right",
            other=self.swaps[task] if acts and instruction == "swapped" else None,
        )


class Lanes:
    """Environments of one task at a time, kept for as long as the task is the same."""

    def __init__(self, env: EnvironmentConfig, view: View) -> None:
        self.env, self.view = env, view
        self._task, self._open = "", list[Environment]()
        self._sentences: dict[str, str] = {}

    def of(self, task: str, count: int, max_seconds: float | None = None) -> list[Environment]:
        """So many environments of a task.  max_seconds: of its trials, None: what the environment says.

        NoSuchEnvironment as `EnvironmentConfig.open`, for another rate, and where nothing says when time is up.
        """
        if task != self._task:
            self.close()
            self._task = task
        while len(self._open) < count:
            env = self.env.open(task, self.view)
            self._open.append(env)
            if not self.env.sets_rate and not same_rate(env.fps, self.view.fps):
                raise NoSuchEnvironment(
                    f"{type(self.env).__name__} takes {env.fps:g} actions per second, and the policy was trained at"
                    f" {self.view.fps:g} frames per second"
                )
        if max_seconds is None and not all(math.isfinite(env.max_seconds) for env in self._open[:count]):
            raise NoSuchEnvironment(
                f"{task} has no simulated time after which an episode has failed: give --max_seconds"
            )
        return self._open[:count]

    def sentence_of(self, task: str) -> str:
        """The instruction of a task. NoSuchEnvironment as `of`."""
        if task not in self._sentences:
            with closing(self.env.open(task, self.view)) as env:
                self._sentences[task] = env.sentence
        return self._sentences[task]

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


def view_of(policy: Inference) -> View:
    """What a policy was trained to see."""
    processor = policy.processor
    return View(policy.inputs.needed_cameras, processor.shapes.image_size, processor.robots[policy.robot].fps)


def run_policy_job(
    job: Job, policy: Inference, lanes: Lanes, paraphrases: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Done:
    """Run the trials together, each in a lane of its own. paraphrases: instruction -> the same in other words."""
    start, clock = perf_counter(), Clock()
    envs = lanes.of(job.task, len(job.trials), job.trials[0].max_seconds)
    policy.inputs.takes_any_task = job.trials[0].instruction != "right"

    def told(trial: Trial) -> str | None:
        match trial.instruction:
            case "swapped":
                assert trial.other is not None
                return lanes.sentence_of(trial.other)
            case "paraphrased":
                return paraphrase(paraphrases, envs[0].sentence, trial.number)
            case "empty":
                return ""
            case "right":
                return None

    courses = [Course(env, trial, told(trial)) for env, trial in zip(envs, job.trials, strict=True)]
    run_policy(policy, courses, clock)
    clock.seconds = perf_counter() - start
    return Done([course.result for course in courses], clock)


def run_baseline_job(job: Job, lanes: Lanes, demonstrations: Demonstrations | None) -> Done:
    """Run the trials one after another. demonstrations: for mean_replay."""
    start, clock = perf_counter(), Clock()
    (env,) = lanes.of(job.task, 1, job.trials[0].max_seconds)
    replay = partial(_mean_trajectory, demonstrations) if job.mode == "mean_replay" else None
    courses = [Course(env, trial) for trial in job.trials]
    for course in courses:
        try:
            run_baseline(course, clock, replay)
        except NoSuchEnvironment:
            raise
        except ValueError as error:  # as without demonstrations of what a scene alone says, or bounds: others go on
            course.result.reason = str(error)
    clock.seconds = perf_counter() - start
    return Done([course.result for course in courses], clock)


# --- jobs of any mode, in processes of their own


@dataclass(frozen=True)
class Worker:
    """Runs jobs in whichever process it is called in."""

    env: EnvironmentConfig
    view: View
    checkpoint: str
    actings: Mapping[Mode, Acting]
    """How the policy acts, by mode."""
    device: str = "cpu"
    demonstrations: Demonstrations | None = None
    base: str | None = None
    paraphrases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """instruction -> the same in other words."""
    tokenizer: str | None = None
    dtype: str | None = None

    def __call__(self, job: Job) -> Done:
        lanes = _lanes_of_process(self.env, self.view)
        if job.mode not in POLICY_MODES:
            return run_baseline_job(job, lanes, self.demonstrations)
        done = run_policy_job(job, _policy(self, self.actings[job.mode]), lanes, self.paraphrases)
        check_memory(done.results)
        _keep_one_failure(done.results)
        return done


def run_in_processes(worker: Worker, jobs: Sequence[Job], processes: int | None = None) -> Generator[tuple[int, Done]]:
    """The jobs as they are done, each with its number in `jobs`. Close it to end the processes early.

    processes: by default as many as cores; one where the policy is on another device, of whose memory each takes a
    policy's.
    Raises ValueError for tasks and cameras that the simulator does not have.
    """
    if not jobs:
        return
    most = available_cores() if worker.device.startswith("cpu") else 1
    with simulator_processes(min(processes or most, len(jobs)), worker.env.warm_up) as pool:
        numbers = {pool.submit(worker, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                yield numbers.pop(future), future.result()
        except ValueError as error:  # its traceback is of another process
            raise ValueError(str(error)) from error
        except ChildProcessError as error:
            raise ChildProcessError(str(error)) from error


def check_memory(results: Sequence[Result]) -> None:
    """ChildProcessError where memory ran out: that tells nothing of a policy, and what is over is kept."""
    for result in results:
        if result.lacked_memory:
            raise ChildProcessError(f"{result.reason}: use fewer with --lanes or --num_workers, and start it again")


def _keep_one_failure(results: Sequence[Result]) -> None:
    """Films are large: of those that failed and are filmed for that alone, keep the first."""
    of_failures = [result for result in results if result.film and result.trial.films == "failure"]
    filmed = any(result.trial.films == "all" and not result.success for result in results)
    for result in of_failures[0 if filmed else 1 :]:
        result.film.clear()


_LANES: list[Lanes] = []  # of this process: those of the one rollout that it works for


def _lanes_of_process(env: EnvironmentConfig, view: View) -> Lanes:
    if not _LANES:
        _LANES.append(Lanes(env, view))
        Finalize(None, _LANES[0].close, exitpriority=10)  # before the interpreter goes, or EGL complains
    return _LANES[0]


_POLICIES = dict[tuple[object, ...], "Pi05Policy"]()  # of this process: those that it loaded


def _policy(worker: Worker, acting: Acting) -> Pi05Policy:
    """The policy of a worker's checkpoint, which acts so; what it loaded for one mode serves all, unless in 8 bits."""
    key = (acting.actions, acting.hierarchical) if worker.dtype == "int8" else ()
    if key not in _POLICIES:
        import torch

        from pi05_lightning.policy import Pi05Policy

        torch.set_num_threads(1)  # as many processes as cores
        options = {name: getattr(worker, name) for name in ("device", "base", "tokenizer", "dtype")}
        _POLICIES[key] = Pi05Policy.from_pretrained(worker.checkpoint, **options, **asdict(acting))
    return _POLICIES[key].acting_as(acting)


_mean_trajectory = cache(mean_trajectory)
