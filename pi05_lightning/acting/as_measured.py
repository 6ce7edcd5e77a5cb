"""What the rollout of a run measured: how its policy acted, so that a server can have it act alike."""

from __future__ import annotations

from dataclasses import fields
from os.path import relpath
from pathlib import Path

from pi05_lightning.acting.options import ROLLOUT, Acting
from pi05_lightning.files.hub import local_folder
from pi05_lightning.files.local import read_json
from pi05_lightning.weights.int8 import Choice
from pi05_lightning.weights.locate import home_of, locate, run_of


def weights_of(checkpoint: Path) -> str:
    """Where in its run a checkpoint's weights are: of a run's directory, those of its newest."""
    return relpath(locate(checkpoint).path.resolve(), run_of(checkpoint).resolve())


def measured(checkpoint: Path, mode: str | None = None) -> tuple[Acting, str, str | None]:
    """How a policy acted in the rollout of its run, in which mode of it, by default its first, and in which dtype.

    Raises ValueError, which says what to do, where the run has no rollout, or one without this mode or of other
    weights.
    """
    file, given, checkpoint = home_of(checkpoint) / ROLLOUT, checkpoint, local_folder(checkpoint)
    anew = f"measure it with `pi05 rollout {given}`, or leave out as_measured and give the options"
    result = read_json(file, default={})
    if not result:
        raise ValueError(f"as_measured: there is no {file}, so nothing was measured: {anew}")
    actings = result.get("acting")
    if not actings:
        raise ValueError(f"as_measured: {file} says of no policy how it acted: {anew}")
    mode = next(iter(actings)) if mode is None else mode
    if mode not in actings:
        raise ValueError(f"as_measured: {file} has no mode {mode}, only {', '.join(actings)}: {anew}")
    if (weights := weights_of(checkpoint)) != result.get("weights"):
        raise ValueError(
            f"as_measured: {file} measured {result.get('weights')}, and {given} is {weights} of the run: name the"
            f" former, or {anew}"
        )
    if result.get("sha256") not in (None, locate(checkpoint).content_hash()):
        raise ValueError(f"as_measured: {file} measured other weights than {given} has now: {anew}")
    if result.get("dtype") == "int8" and not (choice := Choice.file(locate(checkpoint))).is_file():
        raise ValueError(
            f"as_measured: {file} measured those layers in 8 bits that {choice.name} says, which is not in"
            f" {choice.parent}: copy it from where it was measured, or {anew}"
        )
    if unknown := actings[mode].keys() - {field.name for field in fields(Acting)}:
        raise ValueError(f"as_measured: {file} has the option {min(unknown)}, which this version does not know: {anew}")
    return Acting(**actings[mode]), mode, result.get("dtype")
