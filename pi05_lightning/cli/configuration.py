"""Some keys of a run, read from its YAML as `pi05 fit -c` reads it, for commands that build no trainer."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace

from pi05_lightning.cli.layers import GROUPS, LayeredParser
from pi05_lightning.files.shipped import find_config
from pi05_lightning.files.yaml_files import read_yaml
from pi05_lightning.models.config import ModelConfig


def read_configuration(files: Sequence[str], keys: Mapping[str, Any]) -> Namespace:
    """The values of these keys after merging files in order, as `pi05 fit -c … -c …` does; None where no file has one.

    files: paths, or names of shipped configurations; each is the YAML of a run, of which all other keys are left alone,
    or that of a model, which is then `model.config`.  keys: {dotted key: its type}.
    ValueError, with the key, for a file that cannot be read and for a value that does not fit its type.
    """
    parser = RunKeys(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for key, kind in keys.items():
        parser.add_argument(f"--{key}", type=kind, sub_configs=True)
    parser.of_interest = [*keys]
    args = []
    for path in map(find_config, files):
        args += ["--model.config" if "model.config" in keys and is_model(path) else "--config", str(path)]
    try:
        return parser.instantiate(parser.chosen(parser.parse_args(args)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{', '.join(files)}: {error}") from error


def is_model(path: Path) -> bool:
    """Whether a YAML file has a model's dimensions at its top, and not a run's settings."""
    return not check_layer(path).keys().isdisjoint(field.name for field in fields(ModelConfig))


def check_layer(path: Path) -> dict[str, Any]:
    """What a configuration holds; ValueError for one that is no YAML, says a key twice, or leaves a group empty."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no configuration: expected the YAML of a run or of a model")
    for group in GROUPS:
        if group in values and values[group] in (None, []):
            raise ValueError(f"{path}: {group} is empty: give its keys below it, or remove the line")
    return values


class RunKeys(LayeredParser):
    """A parser of some of a run's keys, which accepts all others unseen; the parsers that it makes do not."""

    of_interest: Sequence[str] | None = None

    def chosen(self, namespace: Namespace) -> Namespace:
        """The keys of interest, those that are there."""
        found = Namespace()
        for key in self.of_interest or ():
            if key in namespace:
                found[key] = namespace[key]
        return found

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        super().validate(namespace if self.of_interest is None else self.chosen(namespace), *args, **kwargs)
