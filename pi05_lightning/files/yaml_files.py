"""YAML files that say what is wrong with them; PyYAML itself takes the last of several equal keys without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. ValueError as `compose_yaml`."""
    compose_yaml(path)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def compose_yaml(path: Path) -> yaml.Node | None:
    """The nodes of a YAML file, with their lines; None of an empty one.

    ValueError for a file that is no YAML, and for a key that stands twice in one mapping, with both lines.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    _check(root, path, "")
    return root


def _check(node: yaml.Node | None, path: Path, above: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, path, above)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{above}{key.value}", key.start_mark.line + 1
            if name in lines:
                raise ValueError(
                    f"{path}: {name} stands twice, in lines {lines[name]} and {line}, and only one would count: remove"
                    " one of them"
                )
            lines[name] = line
            _check(value, path, f"{name}.")
