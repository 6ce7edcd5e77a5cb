"""What a run's directory holds, read once for whoever shows it."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from pi05_lightning.acting import ROLLOUT
from pi05_lightning.evaluation.report.metrics import Metrics
from pi05_lightning.evaluation.statistics import Success
from pi05_lightning.files.local import read_json

METRICS = Path("metrics.json")
EXAMPLES = Path("validation", "examples.json")
"""Within a run: what `pi05 validate` drew, by `source/modality`; the pictures lie beside it."""
PROVENANCE = Path("provenance.json")
"""Within a run: commit, command, versions, hardware and data that it was trained with."""
Group = Literal["worst", "first"]


@dataclass(frozen=True)
class Curve:
    """A scalar over optimizer steps."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class ExampleFile:
    """A picture of one validation sample, and what is in it as text."""

    file: str
    group: Group
    key: int
    predicted: str = ""
    truth: str = ""


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk; what it has not got (yet) is empty."""

    folder: Path
    config_yaml: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    questions: dict[str, Metrics] = field(default_factory=dict)
    """Of answers, by `source/qa`: metrics by question."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What these metrics are of: checkpoint, sha256 and step; and with which options and paths."""
    curves: dict[str, Curve] = field(default_factory=dict)
    examples: dict[str, list[ExampleFile]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    videos: list[Path] = field(default_factory=list)
    rollout: dict[str, Any] = field(default_factory=dict)
    """The rollout's result as it is, see `sim.summary.summarise`."""

    @property
    def success(self) -> Success:
        return self.rollout.get("success", {})

    @property
    def acting(self) -> dict[str, dict[str, Any]]:
        """How the policy acted in the rollout, by mode."""
        return self.rollout.get("acting", {})

    @property
    def films(self) -> dict[str, dict[str, Any]]:
        """Of videos by their names: mode, task, seed and how the episode ended, as far as the rollout says."""
        films = self.rollout.get("films")
        return films if isinstance(films, dict) else {}  # once a list of names


def read_run(folder: Path) -> Run:
    """Read what `pi05 fit`, `validate` and `rollout` left in a run's directory.

    Examples whose picture is missing are left out.  Raises ValueError when it is not one.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is not a run's directory: it has no config.yaml (`pi05 fit` writes it)")
    config_yaml = config.read_text(encoding="utf-8")
    return Run(
        folder=folder,
        config_yaml=config_yaml,
        config=yaml.safe_load(config_yaml),
        metrics=read_json(folder / METRICS, default={}),
        questions=read_json(folder / "questions.json", default={}),
        measured=read_json(folder / "measured.json", default={}),
        curves=read_curves(folder),
        examples=read_examples(folder / EXAMPLES),
        provenance=read_json(folder / PROVENANCE, default={}),
        videos=films_of(folder / ROLLOUT.parent),
        rollout=read_json(folder / ROLLOUT, default={}),
    )


def read_examples(file: Path) -> dict[str, list[ExampleFile]]:
    """By `source/modality`, those whose picture lies beside the file."""
    examples = {name: [ExampleFile(**shown) for shown in files] for name, files in read_json(file, default={}).items()}
    found = {
        name: [shown for shown in files if (file.parent / shown.file).is_file()] for name, files in examples.items()
    }
    return {name: files for name, files in found.items() if files}


def films_of(rollout: Path) -> list[Path]:
    """The films of the rollout whose result lies in a folder, and of no other; none where there is no result.

    Results did not name their films at first: those of their modes and tasks are taken then.
    """
    result = read_json(rollout / ROLLOUT.name, default={})
    named = [rollout / Path(name).name for name in result.get("films", [])]
    if "films" not in result:
        for mode, by_task in result.get("success", {}).items():
            for task in by_task:
                named += sorted(rollout.glob(f"{mode}-{glob.escape(task.replace('/', '-'))}-*.mp4"))
    return [film for film in named if film.is_file()]


def is_of_training(tag: str) -> bool:
    """Whether a scalar's steps count from 0, as training's do: validation's and rollouts' say how many there were."""
    return not tag.startswith(("val", "test", "rollout"))


def read_curves(folder: Path) -> dict[str, Curve]:
    """Every scalar in the folder's TensorBoard event files, without what a later start of the run took back.

    A run that goes on with an earlier checkpoint logs its `stage` at a step that it had passed before.
    """
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    known = {tag: points for tag, points in logged.items() if tag.startswith(("stage", "loss/", "val/"))}
    starts, reached = [], 0
    for time, step, tag in sorted((p.wall_time, p.step, name) for name in known for p in known[name]):
        if tag == "stage" and step + 1 < reached:  # validation says one more than training
            starts.append((time, step))
            reached = step
        reached = max(reached, step)
    curves = {}
    for tag, points in logged.items():
        first = 0 if is_of_training(tag) else 1
        kept = {
            point.step: point.value
            for point in points
            if all(point.wall_time >= time or point.step < step + first for time, step in starts)
        }
        steps = sorted(kept)
        curves[tag] = Curve(steps, [kept[step] for step in steps])
    return curves
