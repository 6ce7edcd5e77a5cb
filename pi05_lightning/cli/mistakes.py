"""What is wrong with a command line and its files, shortly: the whole key, the file and line, and what was meant."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pi05_lightning.files.shipped import find_config
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.files.yaml_files import compose_yaml, is_yaml

# lines of jsonargparse's message about a value that fits none of several types: what a user cannot use
_NOISE = (
    r"Does not validate against any of the Union subtypes",
    r"Subtypes: .*",
    r"Errors:",
    r"Expected a path but ([\[{]|null |[\d.]+ ).*either not accessible or invalid",
    r"Given value type: .*",
    r"Given value: .*",
    r"Expected a <class '(NoneType|bool|list|collections\.abc\.Iterable)'>",
    r"Subclass types expect one of:",
    r"a (class path \(str\)|dict with(out)? .*)",
    r"Problem with given class_path '[\w.]+':",
    r"Not a valid subclass of .*",
)
_UNKNOWN = (
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'",
    r"Option '(?P<key>[\w.]+)' is not accepted",
    r"unrecognized arguments: --(?P<key>[\w.-]+)(=\S*)?",
)
_VALUES = (
    r"Expected a dot import path string: (\S+)",
    r"Problem with given class_path '([\w.]+)'",
    r"Expected a path but (\S+) either",
    r"Got value: (\S+)$",
)
_NO_GROUP = r"Unable to load config ['\"](.*)['\"]"
_CLASSES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim")
"""Modules whose classes may be given by their names alone."""
_BASES = {"pi05_lightning.data.sources.base": "SourceConfig", "pi05_lightning.sim.environment": "EnvironmentConfig"}
"""Base classes whose subclasses may be given by their names alone, by the modules that they are in."""
_NO_CLASS = r"module '([\w.]+)' has no attribute '(\w+)'"


@dataclass(frozen=True)
class Said:
    """A key and its value, in a line of a file or in a flag."""

    key: str
    value: yaml.Node | None
    file: str | None
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: " if self.file else ""


def unknown_key(message: str) -> str | None:
    """The dotted key that a message of jsonargparse says is not known, without the keys around it."""
    for pattern in _UNKNOWN:
        if found := re.search(pattern, message):
            groups = found.groupdict()
            return ".".join(part for part in (groups.get("group"), groups["key"]) if part)
    return None


def explained(message: str, args: Sequence[str]) -> str:
    """A message of jsonargparse about these arguments in few lines, with the whole key and where it stands."""
    around = re.findall(r'Parser key "([\w.+]+)":', message)
    key = unknown_key(message)
    if key is not None:
        hint = re.search(r" \(did you mean ([\w.]+)\?\)", message)
        outer = around[0] if around else ""
        said = find(outer, key, args)
        whole = said.key if said else f"{outer}.{key}" if outer else key
        meant = f" (did you mean {whole.removesuffix(key)}{hint[1]}?)" if hint else ""
        dashes = "--" if "unrecognized arguments" in message else ""
        return f"{said or ''}there is no option {dashes}{whole}{meant}"
    if not around:
        return message
    if missing := no_source(message, args):
        return missing
    said = find(around[0], around[-1] if len(around) > 1 else "", args, named_values(message))
    whole = said.key if said else ".".join(dict.fromkeys(around))
    return f"{said or ''}{whole}: {shortened(message)}"


def no_source(message: str, args: Sequence[str]) -> str:
    """What is wrong where options are given to a data source that there is not; else nothing."""
    if not re.search(r"\.SourceConfig is abstract|Not a valid subclass of SourceConfig", message):
        return ""
    keys, whole, left, asked = list[list[str]](), None, set[str](), list[str]()
    for layer in map(list, layers(args)):
        own = [said.key.split(".") for said in layer if said.key.startswith("data.sources.")]
        keys += own
        if replaced := next((said for said in layer if said.key == "data.sources"), None):
            whole, left, asked = replaced, {key[2] for key in own}, []
        left |= {key[2] for key in own if key[3:] == ["class_path"]}
        asked += [key[2] for key in own]
    known = dict.fromkeys(key[2] for key in keys if key[3:] == ["class_path"])
    missing = next((key[2] for key in keys if key[2] not in known), None)
    if missing is None:
        gone = next((name for name in asked if name not in left), None)
        if whole is None or gone is None:
            return ""
        return (
            f"{whole}data.sources: there is no source {gone!r} any more, as this replaces all that are named before it:"
            " name it here too"
        )
    where = find(f"data.sources.{missing}", "", args) or ""
    told = f"; there are {', '.join(known)}" if known else ""
    return f"{where}there is no source {missing!r}{suggestion(missing, known)}{told}: a new one needs its class_path"


def hint_of_other_files(message: str, args: Sequence[str]) -> str:
    """What to write instead, where a path that a message names is there from a file's directory alone; else nothing."""
    for file in {arg.rpartition("=")[2] for arg in args}:
        for said in said_in_file(file) if is_yaml(file) else ():
            path = said.value.value if isinstance(said.value, yaml.ScalarNode) else ""
            there = Path(file).parent / path
            if path and path in message and not os.path.exists(path) and os.path.exists(there):
                return (
                    f"\n{said}{said.key}: paths are relative to the working directory, not to the file that names them:"
                    f" write {there}"
                )
    return ""


def place_of(message: str, args: Sequence[str]) -> str:
    """Where files and flags last say the number that a message is about, with its whole key; else nothing."""
    found = re.search(r"(\S+) is (\S+): it must be", message)
    if found is None:
        return ""
    name, value = found[1].rpartition(".")[2], found[2]
    below = [said for layer in layers(args) for said in layer if f".{said.key}".endswith((f".{found[1]}", f".{name}"))]
    told = [said for said in below if isinstance(said.value, yaml.ScalarNode) and same_number(said.value.value, value)]
    if not told:
        return ""
    return f"{told[-1]}" if message.startswith(f"{told[-1].key} ") else f"{told[-1]}{told[-1].key}: "


def same_number(one: str, other: str) -> bool:
    """Whether two texts are the same number; YAML's .nan and .inf are float's nan and inf."""
    with suppress(ValueError):
        first, second = (
            float(text.lstrip(".")) if text.endswith(("nan", "inf")) else float(text) for text in (one, other)
        )
        return first == second or (first != first and second != second)
    return False


def named_values(message: str) -> list[str]:
    """The values that a message complains about, in the ways in which they may have been written."""
    found = [value for pattern in _VALUES for value in re.findall(pattern, message, re.MULTILINE)]
    classes = re.findall(_NO_CLASS, message)
    return found + [name for module, own in classes for name in (f"{module}.{own}", own)]


def no_class(found: re.Match[str]) -> str:
    module, name = found.groups()
    return f"there is no {name} in {module}{suggestion(name, dir(sys.modules.get(module)))}"


def unknown_class(found: re.Match[str]) -> str:
    known = [name for module in _CLASSES for name in dir(sys.modules.get(module)) if name[0].isupper()]
    bases = [getattr(sys.modules.get(module), name, None) for module, name in _BASES.items()]
    known += [kind.__name__ for base in bases if base for kind in subclasses(base)]
    return f"{found[1]} is no known class{suggestion(found[1], known)}: give its import path"


def subclasses(base: type[Any]) -> Iterator[type[Any]]:
    """All that are imported."""
    for kind in base.__subclasses__():
        yield kind
        yield from subclasses(kind)


def shortened(message: str) -> str:
    """What a message of jsonargparse says beside keys, types and values."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = [re.sub(r'^Parser key "[\w.+]+": ?', "", line) for line in lines]
    told = [line for line in lines if line and not any(re.fullmatch(noise, line) for noise in _NOISE)]
    kinds, given = re.findall(r"Expected an? <class '([\w.]+)'>", message), re.findall("Given value: (.*)", message)
    if not told:
        is_list = {"list", "tuple"} & {*kinds} and "str" not in kinds
        if given and is_list and not given[-1].startswith(("[", "{")) and given[-1] != "None":
            return f"expected a list, as '[{given[-1]}]'"
        return f"expected {' or '.join(kinds).replace('NoneType', 'null')}, got {' '.join(given[-1:])}"
    groups = [line for line in told if re.fullmatch(_NO_GROUP, line)]
    told = [line for line in told if line not in groups] or groups
    if any("dot import path" in line for line in told):  # a name, and no path
        told = [line for line in told if not re.fullmatch(r"Expected a path but \w+ either.*", line)]
    switch = " or true or false" if "bool" in kinds else ""
    text = "; ".join(dict.fromkeys(_plain(line, switch, given[0] if given else "") for line in told))
    text = re.sub(r"Type typing\.\S+\[.*\] expects a function or a callable class: ", "", text)
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


def _plain(line: str, switch: str, given: str) -> str:
    """A line of jsonargparse's in words. switch: what may be written instead of one of the names in it."""
    line = re.sub(_NO_CLASS, no_class, line)
    line = re.sub(_NO_GROUP, r"expected the options below it, or a file with them, got \1", line)
    line = re.sub(r"Expected a dot import path string: (\S+)", unknown_class, line)
    if found := re.fullmatch(r"Expected a typing\.Literal\[(.*?)\](?:\. Got value: (.*))?", line):
        value, names = found[2] or given, found[1].replace("'", "").split(", ")
        return f"expected {found[1].replace(', ', ' or ')}{switch}, got {value}{suggestion(value, names)}"
    if found := re.fullmatch(r"Expected a <class '(?:tuple|list)'>\. Got value: (?!None$)([^\[{].*)", line):
        return f"expected a list, as '[{found[1]}]'"
    if given and line == "Expected a <class 'dict'>":
        return f"expected pairs, as '{{name: value}}', got {given}"
    return re.sub(r"Expected an? (.*?)\. Got value: (.*)", r"expected \1, got \2", line)


# --- where a key stands


def find(outer: str, inner: str, args: Sequence[str], values: Sequence[str] = ()) -> Said | None:
    """Where files and flags last say the key `inner` below the key `outer`, with one of the values if they do at all.

    Without `inner`, where they say one of the values, or the key `outer` itself.
    """
    within = re.compile(rf"{re.escape(outer)}(?![^.\[])" if outer else "")
    below = [said for layer in layers(args) for said in layer if within.match(said.key)]
    told = [said for said in below if isinstance(said.value, yaml.ScalarNode) and said.value.value in values]
    named = [said for said in below if (said.key == outer and not inner) or f".{said.key}".endswith(f".{inner}")]
    both = [said for said in told if said in named]
    found = both or (named if inner else told) or named
    return found[-1] if found else None


def layers(args: Sequence[str]) -> Iterator[Iterator[Said]]:
    """What every file and flag of a command line says."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word in ("-c", "--config"):
            yield said_in_file(value)
        elif word.startswith("--"):
            with suppress(yaml.YAMLError):
                yield said_in(yaml.compose(value, Loader=yaml.SafeLoader), word[2:])


def said_in_file(name: str) -> Iterator[Said]:
    """What a file says; what cannot be read says nothing."""
    with suppress(ValueError):
        yield from said_in(compose_yaml(find_config(name)), "", name)


def said_in(node: yaml.Node | None, key: str, file: str | None = None, line: int = 1) -> Iterator[Said]:
    """A node and all below it by their dotted keys; items of lists by number, as `stages.then[0].steps`."""
    if key:
        yield Said(key, node, file, line)
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            yield from said_in(value, inner, file, name.start_mark.line + 1)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from said_in(value, f"{key}[{number}]", file, value.start_mark.line + 1)
