"""A policy as it is published: a folder that this package and LeRobot open, with a card that says what it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pi05_lightning.data.processor import Processor
from pi05_lightning.files.hub import is_hub_id
from pi05_lightning.files.local import write_text
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot_plugin import save_for_plugin

CARD = "README.md"
TAGS = ["robotics", "vision-language-action", "pi0.5", "pi05_lightning"]


def save_published(
    folder: Path,
    repo: str,
    model: Pi05,
    processor: Processor,
    trained: Trained,
    license: str | None = None,
    sections: Mapping[str, str] | None = None,
    results: Sequence[EvalResult] = (),
    begun_with: str | None = None,
) -> None:
    """Write a policy and its card into a folder. Of one robot, LeRobot opens it too, with the plugin.

    sections: further parts of the card by their heading.  results: what the Hub shows beside it.  begun_with: the
    weights that it was trained from, which the Hub shows too where they are its own.
    Where its data lay on this machine is left out.
    """
    processor = without_places(processor)
    robots = {name: processor.robots[name] for name in processor.acting}
    for_lerobot = len(robots) == 1
    if for_lerobot:
        save_for_plugin(folder, model, processor, next(iter(robots)), trained)
    else:
        save(folder, model, processor, trained)
    metadata = ModelCardData(
        license=license,
        library_name="pi05_lightning",
        pipeline_tag="robotics",
        tags=[*TAGS, *(["LeRobot"] if for_lerobot else [])],
        datasets=[robot.dataset for robot in robots.values() if is_hub_id(robot.dataset)] or None,
        model_name=repo.partition("/")[2],
        base_model=begun_with if begun_with is not None and is_hub_id(begun_with) else None,
        eval_results=list(results) or None,
    )
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    text = templates.get_template("card.md.j2").render(
        metadata=metadata.to_yaml(),
        name=repo.partition("/")[2],
        repo=repo,
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        robots=robots,
        cameras={name: processor.cameras_of(name) for name in robots},
        tasks=list(dict.fromkeys(task for robot in robots.values() for task in robot.tasks)),
        for_lerobot=for_lerobot,
        trained=trained,
        sections=sections or {},
        license=license,
    )
    write_text(folder / CARD, text + "\n")


def without_places(processor: Processor) -> Processor:
    """A processor whose robots' data have their Hub ids, or the names of their folders alone."""
    kept = copy.copy(processor)
    kept.robots = {
        name: robot if is_hub_id(robot.dataset) else replace(robot, dataset=Path(robot.dataset).name)
        for name, robot in processor.robots.items()
    }
    return kept
