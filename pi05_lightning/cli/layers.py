"""Configuration files: what they may name, and the one rule for all paths.

Every path is relative to the working directory, whichever file or flag says it. So a run's saved configuration means
the same wherever the run lies. Upstream goes to the directory of a file while it reads it, which moves some paths (of
files that hold options) and leaves others (of data and weights).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace

from pi05_lightning.files.shipped import find_config, find_model
from pi05_lightning.files.yaml_files import compose_yaml


class Group(NamedTuple):
    """A group of a run's options."""

    title: str
    of: str
    """What the options are arguments of."""


GROUPS = {
    "data": Group("Data", "pi05_lightning.data.datamodule.Pi05DataModule"),
    "model": Group("Model", "pi05_lightning.module.Pi05Module"),
    "stages": Group(
        "Stages: what is trained when, on which data", "pi05_lightning.training.callbacks.stages.StageSwitch"
    ),
    "ema": Group("Average of the weights", "pi05_lightning.training.callbacks.ema.WeightAverage"),
    "checkpoint": Group("Checkpoints", "pi05_lightning.training.callbacks.checkpoint.RunCheckpoint"),
    "acting": Group("How the policy acts", "pi05_lightning.acting.Acting"),
    "trainer": Group("Trainer (Lightning's)", "lightning.pytorch.trainer.trainer.Trainer"),
}
"""A run's options come in these groups; each may stand in a file of its own, as may model.config."""
MODEL = "model.config"


class LayeredParser(ArgumentParser):
    """A parser whose files, wherever they lie, name paths from the working directory, and models by their size."""

    given: Sequence[str] = ()
    """The arguments that are being parsed."""
    layers: Collection[str] = (*GROUPS, MODEL)
    """Options whose value may be the name of a file that holds them."""

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        if args is not None:
            self.given = args
            try:
                args = [self._filled(arg, args[place - 1] if place else "") for place, arg in enumerate(args)]
            except ValueError as error:
                self.error(str(error), error)
        return super().parse_args(args, *more, **options)

    def _filled(self, arg: str, before: str) -> str:
        """An argument; the options themselves where it is the file of a group, or a model's file or name."""
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            return f"{flag}={filled(flag[2:], value)}" if equals and flag[2:] in self.layers else arg
        return filled(before[2:], arg) if before.startswith("--") and before[2:] in self.layers else arg

    def parse_path(self, path: str | os.PathLike, *more: Any, **options: Any) -> Namespace:
        try:
            text = read_layer(Path(path))
        except ValueError as error:
            self.error(str(error), error)
        # by its text: upstream would go to the file's directory
        return self.parse_string(text, path, *more, **options)


def filled(key: str, value: str) -> str:
    """The options that a file of this name holds; a value that is no name is what it is."""
    return read_layer(file_of(key, value), key) if isinstance(plain(value), str) else value


def file_of(key: str, name: str) -> Path:
    """The file that is meant by its name. ValueError for none."""
    return find_model(name) if key == MODEL else find_config(name)


def plain(value: str) -> Any:
    """What a value on the command line is as YAML; None if it is none."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return None


def read_layer(path: Path, key: str = "") -> str:
    """The text of a file of options, in which the files that it names for groups and for the model are filled in.

    key: what the file's options are options of; a run when empty.
    ValueError for files that are missing or no YAML, and for a model that is not shipped.
    """
    root = compose_yaml(path)
    return yaml.serialize(root) if root is not None and fill(root, key, path) else path.read_text(encoding="utf-8")


def fill(node: yaml.Node, key: str, path: Path) -> bool:
    """Put what files hold in the place of their names; whether there was one."""
    if not isinstance(node, yaml.MappingNode):
        return False
    found = False
    for place, (name, value) in enumerate(node.value):
        inner = f"{key}.{name.value}" if key else str(name.value)
        if inner != MODEL and inner not in GROUPS:
            continue
        if isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:str":
            try:
                file = file_of(inner, value.value)
            except ValueError as error:
                raise ValueError(f"{path}, line {value.start_mark.line + 1}, {inner}: {error}") from error
            value = compose_yaml(file)
            node.value[place] = (name, value)
            found = True
        if value is not None:
            found = fill(value, inner, path) or found
    return found
