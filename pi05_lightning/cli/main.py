"""The `pi05` command: a table of commands, each imported only when it is chosen: `--help` waits for no torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import auto_cli, set_parsing_settings

from pi05_lightning.cli.help import OfTheParser, asked, command_help, run_help
from pi05_lightning.cli.layers import LayeredParser
from pi05_lightning.cli.mistakes import explained, hint_of_other_files, place_of, unknown_key
from pi05_lightning.files.shipped import PACKAGE
from pi05_lightning.files.suggestion import suggestion

TRAINER_COMMANDS = {
    "fit": "train a policy through its stages, or resume a run",
    "validate": "measure a checkpoint on the validation data, per modality",
    "test": "the same on what the datasets declare as their test split",
    "predict": "run a checkpoint over the validation data",
}
_NO_CHECKPOINT = "no checkpoint: give its path, or that of a run's directory, as pi05 {} runs/mine"
NEEDED = {
    "fit": "nothing to train: give a configuration, as pi05 fit -c configs/finetune.yaml, or a run to go on with, as"
    " pi05 fit --ckpt_path runs/mine",
    **{name: _NO_CHECKPOINT.format(name) for name in ("validate", "test", "predict")},
}
"""What is said of a command without arguments."""
# each is the function of this name in the module of this name; its signature is the command line
COMMANDS = {
    "demo": "the main job end to end: data, training, evaluation, a page",
    "collect": "record scripted experts in the simulator, or a policy, as a LeRobot dataset",
    "stats": "exact per-dimension statistics of a dataset",
    "tokenizer": "fit a FAST tokenizer on action chunks",
    "profile": "what a configuration costs: FLOPs, bytes, memory, time",
    "report": "a run on one self-contained page",
    "convert": "checkpoints of LeRobot and openpi to ours and back",
    "export": "a policy for OpenVINO, ONNX or PyTorch, with a runner that needs nothing of this package",
    "push": "a run or a dataset to the Hugging Face Hub, with a card",
    "check": "what a policy expects beside what a dataset or a simulator gives it",
    "rollout": "closed-loop success in the simulator, beside baselines",
    "outcomes": "which episodes of a dataset succeeded, where the recording does not say",
    "value fit": "how an attempt will end, learned from attempts, with its calibration",
    "value label": "which actions were better than expected, written beside a dataset",
    "experience": "rounds of attempts, judged and learned from, beside what to compare them with",
    "play": "a page on which a policy is told what to do in the simulator",
    "serve": "a policy server that openpi's clients talk to",
}

SECOND = {"play": "beside"}
"""Of a command, the option that its second word is the value of, as in `pi05 play A B`."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # what is written under a field is its help


class Parser(LayeredParser):
    """An argument parser that takes no abbreviations, and whose errors are short and name the key that was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "pi05", "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = unknown_key(message)
        if key is not None and "(did you mean" not in message:  # of an inner parser, which knew the keys
            message += suggestion(key, {action.dest for action in self._actions})
        if not self.exit_on_error:  # of a class inside: whatever it is a part of may take another one
            super().error(message, ex)
        told = explained(message, self.given) + hint_of_other_files(message, self.given)
        print(f"{self.prog}: {told}\nEvery option: {self.prog} --help", file=sys.stderr)
        sys.exit(2)


class CommandParser(Parser):
    """Of a command that is no run: its `--data` names a dataset, and not a file of options."""

    layers = ("acting",)


def overview(first: str = "") -> str:
    """What `pi05 --help` prints; first: the first word of those commands that it is about."""
    told = {name: text for name, text in (TRAINER_COMMANDS | COMMANDS).items() if name.startswith(first)}
    lines = [f"  {name:<12} {text}" for name, text in told.items()]
    return "\n".join(["usage: pi05 COMMAND [options]", "", *lines, "", "Options of one: pi05 COMMAND --help"])


def show_help(command: str, topic: str) -> None:
    """Print what `--help` or `--help.TOPIC` asks for, and exit: with 2 for a topic that there is not."""
    try:
        if command in TRAINER_COMMANDS:
            print(run_help(command, TRAINER_COMMANDS[command], topic))
        else:
            print(command_help(command, topic))
        sys.exit(0)
    except OfTheParser as error:
        key, name = error.args
        ask = [f"--{key}.help", name]
        if command in TRAINER_COMMANDS:
            load("run")(command, ask)
        else:
            call(load(command), ask, prog=f"pi05 {command}")
    except ValueError as error:
        refuse(command, str(error))


def refuse(command: str, message: str) -> NoReturn:
    """Exit for a mistake in the arguments of a command."""
    print(f"pi05 {command}: {message}\nEvery option: pi05 {command} --help", file=sys.stderr)
    sys.exit(2)


def load(name: str) -> Callable[..., Any]:
    """The function of this name in the module of this name, words joined by `_`."""
    name = name.replace(" ", "_")
    return resolve_name(f"pi05_lightning.cli.{name}:{name}")


def call(function: Callable[..., Any], args: list[str], prog: str) -> Any:
    """Call a function with its parameters read from the command line, or with its one dataclass made from there."""
    hints = get_type_hints(function)
    types: list[Any] = [hints[name] for name in signature(function).parameters]
    options = get_type_hints(types[0]) if len(types) == 1 and is_dataclass(types[0]) else hints
    switches = {name for name, kind in options.items() if kind is bool or bool in get_args(kind)}
    args = said_fully([underscored(arg, options) for arg in args], switches)
    if len(types) == 1 and is_dataclass(types[0]):
        return function(auto_cli(types, args=args, prog=prog, parser_class=CommandParser, return_instance=True))
    return auto_cli(function, args=args, prog=prog, parser_class=CommandParser)


def underscored(arg: str, options: Collection[str]) -> str:
    """A flag whose words are joined by dashes, such as `--as-measured`, under the option's name."""
    flag, equals, value = arg.partition("=")
    name = flag[2:].replace("-", "_")
    return f"--{name}{equals}{value}" if flag.startswith("--") and name in options else arg


def said_fully(args: Sequence[str], switches: Collection[str]) -> list[str]:
    """Arguments in which a switch that stands alone, such as `--force`, has the value that it has then."""
    words = list[str]()
    for arg, following in zip_longest(args, args[1:], fillvalue="-"):
        alone = arg.startswith("--") and arg[2:] in switches and following.startswith("-")
        words += [arg, "true"] if alone else [arg]
    return words


def with_second_named(args: Sequence[str], option: str | None) -> list[str]:
    """Arguments whose second word that is no option's value has the name of the option that it is of before it."""
    words = [i for i, arg in enumerate(args) if not arg.startswith("-") and not (i and _takes_value(args[i - 1]))]
    if option is None or len(words) < 2:
        return list(args)
    return [*args[: words[1]], f"--{option}", *args[words[1] :]]


def _takes_value(arg: str) -> bool:
    return arg.startswith("-") and "=" not in arg


OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENOTDIR)
}
"""Errors of the system that a user mends: no space, no permission, a file too large, too many open, a file in a
folder's place."""


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
    # torchao's, where it is imported for the first time
    warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning)
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if rest and f"{command} {rest[0]}" in COMMANDS:
        command = f"{command} {rest.pop(0)}"
    explains = any(word in arg for arg in rest for word in ("help", "print_config"))
    set_parsing_settings(docstring_parse_attribute_docstrings=explains)  # half of the time that a run's parser takes
    try:
        if command in ("-h", "--help"):
            print(overview())
        elif any(name.startswith(f"{command} ") for name in COMMANDS):  # the first of two words, alone
            print(overview(f"{command} "), file=sys.stdout if asked(rest) is not None else sys.stderr)
            sys.exit(0 if asked(rest) is not None else 2)
        elif command in TRAINER_COMMANDS and not rest:
            refuse(command, NEEDED[command])
        elif command in {**TRAINER_COMMANDS, **COMMANDS} and (topic := asked(rest)) is not None:
            show_help(command, topic)
        elif command in TRAINER_COMMANDS:
            load("run")(command, rest)
        elif command in COMMANDS:
            call(load(command), with_second_named(rest, SECOND.get(command)), prog=f"pi05 {command}")
        else:
            hint = suggestion(command, [*TRAINER_COMMANDS, *COMMANDS])
            print(f"pi05: there is no command {command!r}{hint}\n\n{overview()}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on with the episodes that are not over" if command == "rollout" else ""
        print(f"\npi05 {command}: interrupted{goes_on}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # of `| head`; Python would try to write what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if not is_for_the_user(error):
            raise
        sys.exit(f"pi05 {command}: {place_of(str(error), rest)}{error}{hint_of_other_files(str(error), rest)}")
