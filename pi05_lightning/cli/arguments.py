"""The arguments of `pi05 fit | validate | test | predict` made complete: files found, and which checkpoint is meant."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_info

from pi05_lightning.cli.configuration import check_layer
from pi05_lightning.cli.main import refuse
from pi05_lightning.files.shipped import find_config
from pi05_lightning.training.run_directory import has_checkpoints, tell_ranks, told_by_first_rank
from pi05_lightning.weights.adapter_base import unlinked
from pi05_lightning.weights.locate import RUNS, locate_run, run_of

RESUME_NEEDS = "--resume auto goes on with a run of `pi05 fit`, or starts it: name it with --run"
_CKPT_PATH = "PI05_CKPT_PATH"
"""Environment variable that tells the checkpoint's file to the ranks that Lightning starts."""


def last_run() -> Path:
    """The run that saved last. Raises ValueError when there is none."""
    found = {run_of(path) for path in RUNS.rglob("checkpoints/*.ckpt") if path.exists()}
    if not found:
        raise ValueError(f"there is no checkpoint under {RUNS}/ to go on from")
    return max(found, key=lambda run: locate_run(run).saved_at)


def find_resumed(path: str, run: str | None) -> str:
    """The file that `ckpt_path` means: itself, a run's newest checkpoint, or for `last` that of the run, or of any.

    Never a link, as a run that trains points its own to another file meanwhile. The ranks that Lightning starts take
    the first one's.
    """
    if (told := told_by_first_rank(_CKPT_PATH)) is not None:
        return told
    given = (Path(run) if run else last_run()) if path == "last" else Path(path)
    found = str(unlinked(locate_run(given).path))
    tell_ranks(_CKPT_PATH, found)
    return found


def is_within(checkpoint: str | None, folder: str) -> bool:
    """Whether a checkpoint is one of those that a folder holds, or of the run there."""
    if checkpoint is None:
        return False
    path = Path(checkpoint)
    return Path(folder).resolve() in (path.parent.resolve(), run_of(path).resolve())


def one_machine(text: str, flags: list[str]) -> list[str]:
    """The flag for a checkpoint's configuration, as YAML, of several machines where nothing starts a command on them.

    Lightning would wait for the others. It is said, unless the command's own flags name a number, which then counts.
    """
    trainer = yaml.safe_load(text).get("trainer") or {}
    nodes = trainer.get("num_nodes") or 1
    starters = TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment
    is_given = any(flag.partition("=")[0] == "--trainer.num_nodes" for flag in flags)
    if nodes == 1 or is_given or trainer.get("plugins") or any(starter.detect() for starter in starters):
        return []
    if LightningEnvironment().main_address != "127.0.0.1":  # processes started by hand meet there
        return []
    rank_zero_info(f"trainer.num_nodes is 1 here, and {nodes} in the checkpoint: nothing started several machines")
    return ["--trainer.num_nodes", "1"]


def complete_arguments(command: str, args: list[str], folder: Path) -> list[str]:
    """The arguments with every file found, and the checkpoint's own configuration (put in `folder`) where no other is.

    Raises ValueError for a checkpoint that does not exist, and exits with 2 for a file that is no configuration.
    """
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("-c", "--config", action="append", default=[])
    given.add_argument("--ckpt_path")
    given.add_argument("--run")
    given.add_argument("--resume", choices=["auto"])
    known, rest = given.parse_known_args(args)
    if known.resume and (known.run is None or command != "fit"):
        raise ValueError(RESUME_NEEDS)
    if known.resume and has_checkpoints(Path(known.run)) and not is_within(known.ckpt_path, known.run):
        known.ckpt_path, known.resume = "last", None
    if command != "fit" and rest and not rest[0].startswith("-"):
        known.ckpt_path = rest.pop(0)

    try:
        configs = [str(find_config(name)) for name in known.config]
        for file in configs:
            check_layer(Path(file))
    except ValueError as error:
        refuse(command, str(error))
    complete = []
    if known.run is not None:
        complete += ["--run", known.run]
    if known.resume:
        complete += ["--resume", known.resume]
    if known.ckpt_path is not None:
        checkpoint = find_resumed(known.ckpt_path, known.run)
        complete += ["--ckpt_path", checkpoint]
        if not configs:
            text = locate_run(Path(checkpoint)).run_config()
            (folder / "config.yaml").write_text(text)
            configs = [str(folder / "config.yaml")]
            complete += one_machine(text, rest)
    return [*(word for config in configs for word in ("--config", config)), *complete, *rest]
