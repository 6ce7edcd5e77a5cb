"""A policy as it is published: a folder that this package and LeRobot open, with a card that says what it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pi05_lightning.data.processor import Processor
from pi05_lightning.files.hub import publish, split_revision
from pi05_lightning.files.local import write_text
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot_plugin import save_for_plugin
from pi05_lightning.weights.safetensors import INDEX

CARD = "README.md"
WRITTEN = ("films/*", "run.yaml", "policy_preprocessor*", "policy_postprocessor*", INDEX, "model-*-of-*.safetensors")
"""What a push may write and a later one not: it leaves the repository with that one."""
TAGS = ["robotics", "vision-language-action", "pi0.5", "pi05_lightning"]


@dataclass(frozen=True)
class Licence:
    """What a card says of who may use it.

    id: an identifier of the Hub's, such as apache-2.0, or other.  name, link: of one that the Hub has none for, which
    `other` needs.
    Raises ValueError for `other` without them, and for them without `other`.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        told = self.name is not None and self.link is not None
        if (self.id == "other") != told or (self.name is None) != (self.link is None):
            raise ValueError(
                f"license {self.id}, license_name {self.name}, license_link {self.link}: a licence that the Hub has no"
                " identifier for is `other` with a name and a link, and others have neither"
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """Its fields of a card."""
        found = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value is not None}


def save_published(
    folder: Path,
    repo: str,
    model: Pi05,
    processor: Processor,
    trained: Trained,
    licence: Licence,
    sections: Mapping[str, str] | None = None,
    results: Sequence[EvalResult] = (),
    begun_with: str | None = None,
) -> None:
    """Write a policy and its card into a folder. Of one robot, LeRobot opens it too, with the plugin.

    sections: further parts of the card by their heading.  results: what the Hub shows beside it.  begun_with: the
    Hub's name of the weights that it was trained from, if they came from there, which it shows too.
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
        **licence.metadata,
        library_name="pi05_lightning",
        pipeline_tag="robotics",
        tags=[*TAGS, *(["LeRobot"] if for_lerobot else [])],
        datasets=[split_revision(robot.dataset)[0] for robot in robots.values() if robot.is_on_hub] or None,
        model_name=repo.partition("/")[2],
        base_model=split_revision(begun_with)[0] if begun_with is not None else None,
        eval_results=list(results) or None,
    )
    tasks = list(dict.fromkeys(task for robot in robots.values() for task in robot.tasks))
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    templates.filters["as_it_is"] = as_it_is
    text = templates.get_template("card.md.j2").render(
        metadata=metadata.to_yaml(),
        name=repo.partition("/")[2],
        repo=repo,
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        robots=robots,
        cameras={name: processor.cameras_of(name) for name in robots},
        tasks=tasks,
        example=json.dumps(tasks[0] if tasks else "what to do", ensure_ascii=False),
        for_lerobot=for_lerobot,
        trained=trained,
        sections=sections or {},
        licence=licence,
    )
    write_text(folder / CARD, text + "\n")


def as_it_is(text: str) -> str:
    """Markdown that shows a text as it is, in a paragraph, a list or a table: line breaks are spaces."""
    escaped = re.sub(r"([\\`*_<>\[\]|~&#])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", escaped)  # else it begins a list, a rule or a heading


def publish_policy(folder: Path, repo: str, private: bool) -> str:
    """Put what `save_published` wrote on the Hub; see `publish`."""
    return publish(folder, repo, private=private, replaced=WRITTEN)


def without_places(processor: Processor) -> Processor:
    """A processor whose robots' data have their Hub ids, or the names of their folders alone."""
    kept = copy.copy(processor)
    kept.robots = {
        name: robot if robot.is_on_hub else replace(robot, dataset=Path(robot.dataset).name)
        for name, robot in processor.robots.items()
    }
    return kept
