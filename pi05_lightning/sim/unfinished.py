"""A rollout on its way: the episodes that are over are kept in a folder, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pi05_lightning import __version__
from pi05_lightning.files.local import empty, held, read_json, sha256, write_json
from pi05_lightning.files.shipped import PACKAGE
from pi05_lightning.sim.environment import EnvironmentConfig
from pi05_lightning.sim.rollout import Done
from pi05_lightning.sim.trials import Clock, Result, Trial

WHAT = "what.json"
_NOT_KEPT = {"trial", "film", "steps"}  # the plan has the trial, a film is a file by then, a rollout keeps no steps

log = logging.getLogger(__name__)

Films = dict[str, dict[str, Any]]
"""A film's name: mode, task, seed, and how the episode ended."""

Results = dict[str, dict[str, Any]]
"""`key_of` a trial: its result's fields."""


class Unfinished:
    """The folder of a rollout's jobs that are over, and of their films.

    what: all that decides how episodes go, but for what their trials say themselves.  parts: what decides it in some
    of their modes alone. Another plan takes from it the episodes that it has too.
    """

    def __init__(self, folder: Path, what: dict[str, Any], parts: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.folder = folder
        claim(folder, what, parts)

    @classmethod
    @contextmanager
    def within(
        cls, out: Path, what: dict[str, Any], parts: Mapping[str, Any] = MappingProxyType({})
    ) -> Iterator[Unfinished]:
        """That of a rollout into `out`. It is gone after the block, unless that failed or was interrupted.

        Raises ValueError while another process writes to it.
        """
        folder = out / ".unfinished"
        with held(folder, f"rollout writes to {out}"):
            yield cls(folder, what, parts)
            empty(folder)
            shutil.rmtree(folder, ignore_errors=True)  # NFS keeps a locked file under another name until it is let go

    def keep(self, done: Done, films: Films) -> None:
        """Keep a job that is over, and which films of it there are."""
        kept = {
            "results": {key_of(r.trial): _kept(r) for r in done.results},
            "clock": asdict(done.clock),
            "films": films,
        }
        write_json(self.folder / f"job-{len(self._files())}.json", kept, indent=None)

    def jobs(self) -> Iterator[tuple[Results, Clock, Films]]:
        """What is kept of each job: its results, what they took, and their films."""
        for file in self._files():
            kept = read_json(file)
            yield kept["results"], Clock(**kept["clock"]), kept["films"]

    def _files(self) -> list[Path]:
        return list(self.folder.glob("job-*.json"))


def key_of(trial: Trial) -> str:
    """What decides how a trial goes."""
    return json.dumps(vars(trial), sort_keys=True)


def _kept(result: Result) -> dict[str, Any]:
    return {name: value for name, value in vars(result).items() if name not in _NOT_KEPT}


def claim(folder: Path, what: dict[str, Any], parts: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a folder that is there keeps something of `what`; if not, it is emptied, and keeps that from now on.

    parts: what decides some of it alone. One that was not known before makes no difference.
    """
    before = read_json(folder / WHAT, default={})
    changed = [name for name in what if what[name] != before.get(name)]
    changed += [name for name in parts if parts[name] != before.get(name, parts[name])]
    if before and not changed:
        write_json(folder / WHAT, {**before, **parts})
        return True
    if before:
        log.warning("%s: beginning anew, as what was interrupted had other %s", folder, ", ".join(sorted(changed)))
    empty(folder)
    write_json(folder / WHAT, {**what, **parts})
    return False


def versions(env: EnvironmentConfig) -> dict[str, str]:
    """The code that decides how episodes go, which may change between two starts."""
    decides = ("acting", "data", "models", "sim")
    files = [file for part in decides for file in sorted((PACKAGE / part).rglob("*.py"))]
    hashes = [sha256(file) for file in (*files, Path(inspect.getfile(type(env))))]
    return {"version": __version__, "code": hashlib.sha256("".join(hashes).encode()).hexdigest()}
