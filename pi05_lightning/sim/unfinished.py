"""A rollout on its way: the jobs that are over are kept in a folder, so that an interrupted one goes on."""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pi05_lightning import __version__
from pi05_lightning.files.local import held, read_json, sha256, write_json
from pi05_lightning.sim.environment import EnvironmentConfig
from pi05_lightning.sim.rollout import Job
from pi05_lightning.sim.trials import Clock

WHAT = "what.json"
_NOT_KEPT = {"film", "steps", "delays"}  # a film is a file by then, a rollout keeps no steps, the plan has the delays

logger = logging.getLogger(__name__)

Films = dict[str, dict[str, Any]]
"""A film's name: mode, task, seed, and how the episode ended."""


class Unfinished:
    """The folder of a rollout's jobs that are over, and of their films.  what: all that decides how episodes go."""

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.folder = folder
        claim(folder, what)

    @classmethod
    @contextmanager
    def within(cls, out: Path, what: dict[str, Any]) -> Iterator[Unfinished]:
        """That of a rollout into `out`. It is gone after the block, unless that failed or was interrupted.

        Raises ValueError while another process writes to it.
        """
        folder = out / ".unfinished"
        with held(folder, f"rollout writes to {out}"):
            yield cls(folder, what)
            shutil.rmtree(folder)

    def keep(self, number: int, job: Job, films: Films) -> None:
        """Keep a job that is over, by its number in the plan, and which films of it there are."""
        trials = [{key: value for key, value in vars(trial).items() if key not in _NOT_KEPT} for trial in job.trials]
        write_json(self._file(number), {"trials": trials, "clock": asdict(job.clock), "films": films}, indent=None)

    def complete(self, jobs: Iterable[Job]) -> dict[int, Films]:
        """Fill in the jobs of a plan that were kept: their numbers, and the films of each."""
        found = dict[int, Films]()
        for number, job in enumerate(jobs):
            kept = read_json(self._file(number), default={})
            if not kept:
                continue
            for trial, values in zip(job.trials, kept["trials"], strict=True):
                vars(trial).update(values)
            job.clock.add(Clock(**kept["clock"]))
            found[number] = kept["films"]
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"job-{number}.json"


def claim(folder: Path, what: dict[str, Any]) -> bool:
    """Whether a folder that is there keeps something of `what`; if not, it is emptied, and keeps that from now on."""
    before = read_json(folder / WHAT, default={})
    if before == what:
        return True
    if before:
        changed = ", ".join(sorted(name for name in what if what[name] != before.get(name)))
        logger.warning("%s: beginning anew, as another one was interrupted (other %s)", folder, changed)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_json(folder / WHAT, what)
    return False


def versions(env: EnvironmentConfig) -> dict[str, str]:
    """The code that decides how episodes go, which may change between two starts."""
    return {"version": __version__, "simulator": sha256(Path(inspect.getfile(type(env))))}
