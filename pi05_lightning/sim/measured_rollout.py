"""A rollout into a folder: its trials are run, those of an interrupted one kept, and what they came to is written."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pi05_lightning.acting import ROLLOUT, weights_of
from pi05_lightning.data.labels import fingerprint
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.files.local import write_json
from pi05_lightning.sim import video
from pi05_lightning.sim.rollout import Plan, Worker, run_in_processes
from pi05_lightning.sim.summary import by_group, summarise
from pi05_lightning.sim.trials import Clock, Result
from pi05_lightning.sim.unfinished import Films, Unfinished, key_of

log = logging.getLogger(__name__)


def deciding(worker: Worker) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides how all episodes go, and what does in some of the modes and instructions alone, by name."""
    of_some = {"actings", "demonstrations", "paraphrases"}
    parts = {f"acting of {mode}": str(acting) for mode, acting in worker.actings.items()}
    if worker.demonstrations is not None:
        parts["demonstrations"] = str(worker.demonstrations)
        parts["replayed"] = fingerprint(LeRobotFiles.open(Path(worker.demonstrations.path)))
    if worker.paraphrases:
        parts["paraphrases"] = str(worker.paraphrases)
    of_all = vars(worker) | {"checkpoint": Path(worker.checkpoint).resolve()}  # however it is spelled
    return {name: str(value) for name, value in of_all.items() if name not in of_some}, parts


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
        log.warning("%d of %d episodes were over when it was interrupted, and are kept", len(results), len(trials))
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
            written[name] = {
                "mode": trial.column,
                "task": trial.task,
                "seed": trial.seed,
                "number": trial.number,
                "outcome": result.outcome,
            }
        result.film.clear()
    return written


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
        if film.name not in result["films"] or (unfinished / film.name).exists():  # else it was moved, as below
            film.unlink(missing_ok=True)
            film.with_suffix(".png").unlink(missing_ok=True)
    for name in result["films"]:
        for file in (unfinished / name, (unfinished / name).with_suffix(".png")):
            if file.exists():  # else it was moved before the command was interrupted here
                file.replace(out / file.name)
    write_json(out / ROLLOUT.name, result)
