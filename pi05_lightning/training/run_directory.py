"""A run's directory: where a new one goes, and that it overwrites nothing that is not a run's."""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from pi05_lightning.files.local import write_text
from pi05_lightning.ranks import by_first_rank, is_first_rank, of_all_ranks, together
from pi05_lightning.weights.locate import RUNS

CONFIG = "config.yaml"
MARK = "# The whole configuration of this run, as pi05 resolved it."
"""First line of a run's config.yaml: no file without it is a run's."""
MEASURED = ("metrics.json", "metrics.csv", "questions.json", "measured.json")
WRITTEN = (CONFIG, "checkpoints", "validation", "provenance.json", *MEASURED, "report.html")
"""What a run may write into its directory, beside the logger's files."""
_RUN = "PI05_RUN"
"""Environment variable that tells the run's directory to the ranks that Lightning starts."""


def write_config(run: Path, text: str) -> None:
    """The run's config.yaml, marked as such."""
    write_text(run / CONFIG, f"{MARK}\n{text}")


def has_checkpoints(folder: Path) -> bool:
    """Whether a run in this folder has saved anything."""
    return any((folder / "checkpoints").glob("*.ckpt"))


def configuration_in(folder: Path) -> Path | None:
    """The file in which a run wrote its configuration, if a folder has one."""
    file = folder / CONFIG
    marked = file.is_file() and file.open(encoding="utf-8", errors="replace").readline().strip() == MARK
    return file if marked else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory."""
    return configuration_in(folder) is not None or has_checkpoints(folder)


def check_free(folder: Path) -> None:
    """Raises ValueError for a folder with files that a run there would overwrite, and that no run wrote."""
    if is_run(folder):
        return
    foreign = [name for name in WRITTEN if (folder / name).exists()]
    if foreign:
        raise ValueError(
            f"{folder} is no run's directory, and a run would overwrite its {', '.join(foreign)}: name another --run"
        )


def tell_ranks(variable: str, value: str) -> None:
    """Tell something, by an environment variable, to the ranks that Lightning starts from this process."""
    os.environ[variable] = f"{os.getpid()} {value}"


def told_by_first_rank(variable: str) -> str | None:
    """What `tell_ranks` told this process, if the first rank started it as another rank."""
    first, _, value = os.environ.get(variable, "").partition(" ")
    return value if first == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0" else None


def check_shared(folder: Path, patience: float = 60) -> None:
    """ValueError on all ranks where one does not see what the first one writes to a folder; collective.

    patience: seconds, as file systems of several machines may show a folder for a while as it was.
    """
    token = folder / of_all_ranks(f".{uuid4()}.seen-by-all")[0]
    by_first_rank(partial(write_text, token, ""))
    end = time.monotonic() + patience
    try:
        with together():
            while not token.exists():
                if time.monotonic() > end:
                    raise ValueError(
                        f"{folder}, where the run is saved, is not the same folder on all machines:"
                        f" {socket.gethostname()} does not see what the first rank writes there. Choose a --run (or"
                        " checkpoint.dirpath) on a disk that all of them share"
                    )
                time.sleep(0.1)
    finally:
        if is_first_rank():
            token.unlink(missing_ok=True)


def new_run() -> Path:
    """A directory under runs/ that did not exist, called after the time; the same for the ranks that Lightning starts.

    Raises ValueError where all ranks are started from outside, as by torchrun or srun: nothing tells them one name.
    """
    several = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1
    if several and (TorchElasticEnvironment.detect() or SLURMEnvironment.detect()):
        raise ValueError("each process of this job would make a run of its own: give them one name with --run")
    if (told := told_by_first_rank(_RUN)) is not None:
        return Path(told)
    started, number = datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), 1
    while True:
        folder = RUNS / (started if number == 1 else f"{started}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            tell_ranks(_RUN, str(folder))
            return folder
