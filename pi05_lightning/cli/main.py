"""The `pi05` command: a table of commands, each imported only when it is chosen: `--help` waits for no torch."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings

from pi05_lightning.data.errors import suggestion
from pi05_lightning.files.shipped import PACKAGE

TRAINER_COMMANDS = {
    "fit": "train a policy through its stages, or resume a run",
    "validate": "measure a checkpoint on the validation data, per modality",
    "test": "the same on what the datasets declare as their test split",
    "predict": "run a checkpoint over the validation data",
}
# each is the function of this name in the module of this name; its signature is the command line
COMMANDS = {
    "demo": "the main job end to end: data, training, evaluation, a page",
    "collect": "record scripted experts in the simulator as a LeRobot dataset",
    "stats": "exact per-dimension statistics of a dataset",
    "tokenizer": "fit a FAST tokenizer on action chunks",
    "profile": "what a configuration costs: FLOPs, bytes, memory, time",
    "report": "a run on one self-contained page",
    "convert": "checkpoints of LeRobot and openpi to ours and back",
    "rollout": "closed-loop success in the simulator, beside baselines",
    "serve": "a policy server that openpi's clients talk to",
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # what is written under a field is its help


class Parser(ArgumentParser):
    """An argument parser that takes no abbreviations, and whose errors are short and name the key that was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        known = {action.dest for action in parser._actions}
        hints = "".join(suggestion(key, known) for key in rejected_keys(message))
        print(f"{parser.prog}: {message}{hints}\nEvery option: {parser.prog} --help", file=sys.stderr)
        sys.exit(2)


def rejected_keys(message: str) -> list[str]:
    """The dotted keys that a message of jsonargparse says are unknown."""
    in_group = re.findall(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    return (
        [f"{group}.{option}" for group, option in in_group]
        + re.findall(r"^Option '([\w.]+)'", message)
        + (re.findall(r"--([\w.-]+)", message) if message.startswith("unrecognized arguments") else [])
    )


def overview() -> str:
    """What `pi05 --help` prints."""
    lines = [f"  {name:<10} {text}" for name, text in (TRAINER_COMMANDS | COMMANDS).items()]
    return "\n".join(["usage: pi05 COMMAND [options]", "", *lines, "", "Options of one: pi05 COMMAND --help"])


def load(name: str) -> Callable[..., Any]:
    """The function of this name in the module of this name."""
    return getattr(import_module(f"pi05_lightning.cli.{name}"), name)


def call(function: Callable[..., Any], args: list[str], prog: str) -> Any:
    """Call a function with its parameters read from the command line, or with its one dataclass made from there."""
    hints = get_type_hints(function)
    types: list[Any] = [hints[name] for name in signature(function).parameters]
    options = get_type_hints(types[0]) if len(types) == 1 and is_dataclass(types[0]) else hints
    switches = {name for name, kind in options.items() if kind is bool}
    args = [word for place, arg in enumerate(args) for word in said_fully(arg, args[place + 1 : place + 2], switches)]
    if len(types) == 1 and is_dataclass(types[0]):
        return function(auto_cli(types, args=args, prog=prog, parser_class=Parser, return_instance=True))
    return auto_cli(function, args=args, prog=prog, parser_class=Parser)


def said_fully(arg: str, following: Sequence[str], switches: Collection[str]) -> list[str]:
    """A switch that stands alone, such as `--force`, with the value that it has then."""
    alone = not following or following[0].startswith("-")
    return [arg, "true"] if alone and arg.startswith("--") and arg[2:] in switches else [arg]


OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE}
"""Errors of the system that a user mends: no space, no permission, a file too large, too many open."""


def is_for_the_user(error: Exception) -> bool:
    """Whether the message of an error is all that helps, and a traceback would hide it.

    It is where this package raised the error itself, and where the machine has no room or gives no permission.
    """
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(PACKAGE)


def main(args: list[str] | None = None) -> None:
    """Run one `pi05` command. args: those of the process when None.

    Exits with 2 on a mistake in the arguments, with 1 when the command refuses to go on.
    """
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        if command in ("-h", "--help"):
            print(overview())
        elif command in TRAINER_COMMANDS:
            load("run")(command, rest)
        elif command in COMMANDS:
            call(load(command), rest, prog=f"pi05 {command}")
        else:
            hint = suggestion(command, [*TRAINER_COMMANDS, *COMMANDS])
            print(f"pi05: there is no command {command!r}{hint}\n\n{overview()}", file=sys.stderr)
            sys.exit(2)
    except (ValueError, OSError) as error:
        if not is_for_the_user(error):
            raise
        sys.exit(f"pi05 {command}: {error}")
