"""`pi05 rollout`: closed-loop success, beside baselines in the same initial states."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from pi05_lightning.acting import ROLLOUT, Acting, weights_of
from pi05_lightning.data.labels import fingerprint
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.robot import Robot
from pi05_lightning.evaluation.agreement import Finding
from pi05_lightning.evaluation.report.run import films_of
from pi05_lightning.files.local import shown, write_json
from pi05_lightning.files.ranges import check_range
from pi05_lightning.policy import Dtype, Pi05Policy, check_device, check_dtype
from pi05_lightning.sim import video
from pi05_lightning.sim.baselines import Demonstrations, check_replay
from pi05_lightning.sim.environment import EnvironmentConfig, check_tasks, tasks_to_run
from pi05_lightning.sim.glimpse import beside_simulator
from pi05_lightning.sim.instructions import (
    PARAPHRASES,
    Instruction,
    check_unheard,
    paraphrase,
    read_paraphrases,
    swapped_tasks,
)
from pi05_lightning.sim.modes import DELAYED, POLICY_MODES, Mode, acting_in
from pi05_lightning.sim.rollout import Plan, Worker, available_modes, run_in_processes, view_of
from pi05_lightning.sim.simulators import MetaWorld
from pi05_lightning.sim.summary import by_group, summarise, tables
from pi05_lightning.sim.trials import Clock, Result
from pi05_lightning.sim.unfinished import Films, Unfinished, key_of, versions
from pi05_lightning.weights.locate import home_of, locate, pinned

logger = logging.getLogger(__name__)


def rollout(
    checkpoint: Path,
    tasks: list[str] | None = None,
    env: EnvironmentConfig = MetaWorld(),  # noqa: B008 - frozen
    episodes: int = 25,
    modes: tuple[Mode, ...] | None = None,
    out: Path | None = None,
    dataset: Path | None = None,
    max_seconds: float | None = None,
    videos: int = 1,
    lanes: int = 8,
    num_workers: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: Dtype | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    delays: tuple[int, ...] = (),
    instructions: tuple[Instruction, ...] = ("right",),
    swaps: dict[str, str] | None = None,
    paraphrases: Path | None = None,
    **acting: Any,
) -> dict[str, Any]:
    """Run a checkpoint in a simulator, and baselines from the same initial states, and compare.

    Interrupted or killed, the same command goes on with the episodes that were not over.

    Args:
        checkpoint: a .ckpt, a run's directory, an exported folder, LeRobot's or openpi's.
        tasks: the simulator's names of tasks; by default those that it was trained on (MetaWorld, MT50, Desk),
            all of `--env.suites` (Libero), the default of the environment (LeRobotEnv).
        env: the simulator: MetaWorld, MT50, Desk, Libero, LeRobotEnv, or an EnvironmentConfig of your own by its
            import path.
        episodes: initial states per task, the same for every mode.
        modes: policy (as `acting` says), flat (the task alone conditions the actions), fast (actions from
            FAST tokens), rtc and async (with `delays`: real-time chunking, and without it), and the baselines
            mean_replay (mean training trajectory), random (uniform actions), expert (scripted; it sees the goal); by
            default all that policy, simulator and data allow.
        out: folder for results, in place of earlier ones; by default `rollout` beside the checkpoint, of a Hub id in
            runs/NAME.
        dataset: the demonstrations, for mean_replay; by default those named in the checkpoint.
        max_seconds: simulated time after which an episode has failed; by default 6 per step of a task, 5 in MT50,
            LeRobot's in others.
        videos: episodes per task and policy mode that are filmed, and beside them one that fails, if any does.
        lanes: episodes that a process steps together.
        num_workers: processes; one per core, or on a GPU one.
        seed: of the initial states and the noise.
        device: where the policy runs; the simulator is on the CPU, but for what it renders.
        dtype: what the weights are cast to; by default they stay as they are. With int8, layers compute in 8 bits on a
            CPU, as far as actions stay what they are.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        delays: for rtc and async: actions that are executed while a chunk is computed, of [1, 1, 2] one for each chunk;
            by default always `inference_delay`.
        instructions: what the policy is told in each mode: right, swapped (another task's instruction),
            paraphrased (the right one in other words), empty (nothing).
        swaps: by task, the one whose instruction is given as swapped; by default of its scene, among
            `tasks`, or the next.
        paraphrases: a YAML file with a list of other words for each instruction; by default MetaWorld's and the desk's.
        acting: how the policy acts in the mode `policy`, see `Acting`.

    Returns and writes {"success": {mode: {task: [successes, trials]}}, …}, see `sim.summary.summarise`.
    Raises ValueError for tasks, cameras and modes that the simulator does not have.
    """
    check_range("num_workers", num_workers, 1)
    check_told("swaps", swaps, "swapped", instructions)
    check_told("paraphrases", paraphrases, "paraphrased", instructions)
    check_device(device)
    check_dtype(dtype, device)
    env.warm_up()  # what is missing shows before the weights are read
    out = out or home_of(checkpoint) / ROLLOUT.parent
    given, checkpoint = checkpoint, pinned(checkpoint)
    how = Acting(**acting)
    policy = Pi05Policy.from_pretrained(checkpoint, base=base, tokenizer=tokenizer, dtype=dtype, **asdict(how))
    robot = policy.processor.robots[policy.robot]
    tasks = tasks_to_run(env, tasks, robot)
    check_tasks(env, (task for task in tasks if not env.is_chain(task)))
    demonstrations = demonstrations_of(robot, dataset)
    modes = modes_of(policy, env, tasks, modes, delays, demonstrations)
    others = swapped_of(env, tasks, swaps or {}) if "swapped" in instructions else {}
    plan = Plan(env, tasks, modes, episodes, "rollout", videos, lanes, max_seconds, seed, delays, instructions, others)
    heard = [task for known in policy.processor.robots.values() for task in known.tasks]
    words = paraphrases_of(env, tasks, paraphrases or PARAPHRASES, heard) if "paraphrased" in instructions else {}
    actings: dict[Mode, Acting] = {
        mode: policy.acting_as(acting_in(mode, how, delays)).resolved for mode in modes if mode in POLICY_MODES
    }
    for finding in differences(policy, env, tasks):
        logger.warning("%s (`pi05 check` tells more)", finding)
    replayed = demonstrations if "mean_replay" in modes else None
    worker = Worker(env, view_of(policy), str(checkpoint), actings, device, replayed, base, words, tokenizer, dtype)
    del policy  # maybe gigabytes: every process loads its own
    if dtype == "int8":
        for way in {(way.actions, way.hierarchical): way for way in actings.values()}.values():
            # which layers compute in 8 bits is measured once for each way of acting, not in every process
            Pi05Policy.from_pretrained(checkpoint, base=base, tokenizer=tokenizer, dtype=dtype, **asdict(way))
    policy_hash = locate(checkpoint).content_hash()
    what, parts = deciding(worker)
    with Unfinished.within(out, {**what, "weights": policy_hash, **versions(env)}, parts) as unfinished:
        results, clocks, filmed = run_all(plan, worker, num_workers, unfinished)
        result = summary_of(results, clocks, plan, worker)
        result |= {"checkpoint": str(given), "sha256": policy_hash, "films": filmed}
        replace_result(out, films_of(out), unfinished.folder, result)
    Console().print(*tables(result))
    return result


def deciding(worker: Worker) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides how all episodes go, and what does in some of the modes and instructions alone, by name."""
    of_some = {"actings", "demonstrations", "paraphrases"}
    parts = {f"acting of {mode}": str(acting) for mode, acting in worker.actings.items()}
    if worker.demonstrations is not None:
        parts["demonstrations"] = str(worker.demonstrations)
        parts["replayed"] = fingerprint(LeRobotFiles.open(Path(worker.demonstrations.path)))
    if worker.paraphrases:
        parts["paraphrases"] = str(worker.paraphrases)
    return {name: str(value) for name, value in vars(worker).items() if name not in of_some}, parts


def modes_of(
    policy: Pi05Policy,
    env: EnvironmentConfig,
    tasks: Sequence[str],
    wanted: Sequence[Mode] | None,
    delays: tuple[int, ...],
    demonstrations: Demonstrations | None,
) -> tuple[Mode, ...]:
    """The modes to run. ValueError for wanted ones that cannot be, and for delays that none has or a chunk is short of.

    demonstrations: what mean_replay replays, if it is here.
    """
    no_replay, how = None, policy.acting
    if demonstrations is None:
        no_replay = "the demonstrations are not here: say where with --dataset"
    elif wanted is None or "mean_replay" in wanted:
        robot = policy.processor.robots[policy.robot]
        try:
            check_replay(demonstrations, robot, {task: env.sentences(task) for task in tasks})
        except ValueError as error:
            no_replay = str(error)
            if wanted is None:
                logger.warning("the mode mean_replay is left out: %s", error)
    fast = policy.abilities.fast and how.actions == "flow"
    modes = available_modes(env, no_replay, wanted, policy.hierarchical, fast, delayed_modes(policy, how, delays))
    if {*modes} & {*DELAYED}:
        acting_in("async", how, delays).executed(policy.horizon)  # chunks last as long as any delay
    elif delays:
        raise ValueError(f"delays: of the modes {' and '.join(DELAYED)} alone: add one to --modes, or leave them out")
    return modes


def sentence_of(env: EnvironmentConfig, task: str) -> str | None:
    """A task's instruction; None where only its environment can tell."""
    return next(iter(env.sentences(task)), None)


def swapped_of(env: EnvironmentConfig, tasks: Sequence[str], swaps: Mapping[str, str]) -> dict[str, str]:
    """task -> the one whose instruction is given. ValueError where there is none."""
    check_tasks(env, swaps.values())
    return swapped_tasks(tasks, swaps, env.partners(tasks), partial(sentence_of, env))


def paraphrases_of(
    env: EnvironmentConfig, tasks: Sequence[str], file: Path, heard: Sequence[str]
) -> dict[str, list[str]]:
    """instruction -> the same in other words, for every task whose instruction is known before it is opened.

    heard: the instructions that the policy was trained on.  ValueError for a task without other words, and for heard
    ones.
    """
    words = read_paraphrases(file)
    for sentence in filter(None, map(partial(sentence_of, env), tasks)):
        paraphrase(words, sentence, 0)
    check_unheard(words, heard, file)
    return words


def check_told(name: str, given: object, kind: Instruction, instructions: Sequence[Instruction]) -> None:
    """ValueError for an option that is given, and is for a kind of instruction that is not."""
    if given is not None and kind not in instructions:
        raise ValueError(f"{name}: of the instruction {kind} alone: add it to --instructions, or leave {name} out")


def demonstrations_of(robot: Robot, dataset: Path | None) -> Demonstrations | None:
    """What a robot was trained on, if it is here. ValueError for a `dataset` that is no LeRobot v3 dataset."""
    path = dataset or Path(robot.dataset)
    if (path / "meta" / "tasks.parquet").is_file():
        return Demonstrations(str(path), robot.action_keys)
    if dataset is not None:
        raise ValueError(f"dataset: {shown(dataset)} is no LeRobot v3 dataset, as it has no meta/tasks.parquet")
    return None


def differences(policy: Pi05Policy, env: EnvironmentConfig, tasks: Sequence[str]) -> list[Finding]:
    """What the simulator gives otherwise than the policy expects, by a look at the beginning of a few episodes."""
    view = view_of(policy)
    expected = replace(policy.processor.robots[policy.robot], cameras=view.cameras)
    found = beside_simulator(expected, policy.abilities, policy.horizon, env, tasks, view, expert=False)
    return [finding for finding in found if finding.verdict == "differs"]


def delayed_modes(policy: Pi05Policy, how: Acting, delays: tuple[int, ...]) -> list[Mode]:
    """Modes with a delay that the policy is able to: none without `delays`, and rtc only where it was trained to."""
    if not delays:
        return []
    most, asked = policy.abilities.max_delay, acting_in("rtc", how, delays).inference_delay
    if policy.abilities.flow and (most is None or asked <= most):
        return list(DELAYED)
    logger.warning(
        "the mode rtc is left out: the policy was not trained to go on from %d actions (model.rtc_max_delay)", asked
    )
    return ["async"]


def run_all(
    plan: Plan, worker: Worker, num_workers: int | None, unfinished: Unfinished
) -> tuple[list[Result], dict[str, Clock], Films]:
    """The results of the plan's trials, what those of each column took, and the films.

    What was over before an interruption is not run again.
    """
    trials = {key_of(trial): trial for job in plan.jobs() for trial in job.trials}
    known = {(trial.column, trial.task, trial.seed) for trial in trials.values()}
    clocks, filmed, results = {trial.column: Clock() for trial in trials.values()}, Films(), dict[str, Result]()
    for kept, clock, films in unfinished.jobs():
        if taken := kept.keys() & trials.keys() - results.keys():  # else it is of another plan
            results |= {key: Result(trials[key], **kept[key]) for key in taken}
            clocks[trials[min(taken)].column].add(clock)
            filmed |= {
                name: film for name, film in films.items() if (film["mode"], film["task"], film["seed"]) in known
            }
    if results:
        logger.warning("%d of %d episodes were over when it was interrupted, and are kept", len(results), len(trials))
    todo = list(plan.jobs(without=lambda trial: key_of(trial) in results))
    with (
        closing(run_in_processes(worker, todo, num_workers)) as jobs,
        tqdm(total=len(trials), initial=len(results), unit="episode", desc="rollout") as bar,
    ):
        for _, done in jobs:
            films = write_films(unfinished.folder, done.results, filmed)
            unfinished.keep(done, films)
            results |= {key_of(result.trial): result for result in done.results}
            clocks[done.results[0].trial.column].add(done.clock)
            filmed |= films
            bar.update(len(done.results))
    return [results[key] for key in trials], clocks, dict(sorted(filmed.items()))


def summary_of(results: Sequence[Result], clocks: Mapping[str, Clock], plan: Plan, worker: Worker) -> dict[str, Any]:
    """What the trials came to, and all that is needed to run them again."""
    result = summarise(results, clocks)
    return (
        result
        | by_group(result["success"], plan.env.groups())
        | {
            "process_seconds": {mode: round(clock.seconds, 1) for mode, clock in clocks.items()},
            "delays": list(plan.delays),
            "dtype": worker.dtype,
            "acting": {mode: asdict(acting) for mode, acting in worker.actings.items()},
            "env": str(plan.env),
            "held_out": plan.env.held_out,
            "seed": plan.seed,
            "weights": weights_of(Path(worker.checkpoint)),
        }
    )


def replace_result(out: Path, before: Iterable[Path], unfinished: Path, result: dict[str, Any]) -> None:
    """Put a rollout's films and result into `out` in place of the ones before; what else is there stays."""
    (out / ROLLOUT.name).unlink(missing_ok=True)
    for film in before:
        film.unlink(missing_ok=True)
        film.with_suffix(".png").unlink(missing_ok=True)
    for name in result["films"]:
        for file in (unfinished / name, (unfinished / name).with_suffix(".png")):
            if file.exists():  # else it was moved before the command was interrupted here
                file.replace(out / file.name)
    write_json(out / ROLLOUT.name, result)


def write_films(folder: Path, results: Iterable[Result], before: Films) -> Films:
    """An mp4 and a PNG of each trial that was filmed; its result then forgets the film.

    Of a mode and task, a failure that is filmed for that alone is written where there is none in `before`.
    """
    written = Films()
    for result in results:
        trial, known = result.trial, (before | written).values()
        failed = {(film["mode"], film["task"]) for film in known if film["outcome"] != "success"}
        if result.film and (trial.films == "all" or (trial.column, trial.task) not in failed):
            column, task = trial.column.replace(", ", "-"), trial.task.replace("/", "-")
            name = f"{column}-{task}-{trial.seed}.mp4"
            video.write(folder / name, result)
            written[name] = {"mode": trial.column, "task": trial.task, "seed": trial.seed, "outcome": result.outcome}
        result.film.clear()
    return written
