"""`pi05 COMMAND --help` and `--help.TOPIC`: from signatures and docstrings as they stand in the source.

The parser itself would have to import torch, Lightning and LeRobot, which takes ten seconds and more.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from pi05_lightning.cli.layers import GROUPS, Group
from pi05_lightning.cli.signatures import Found, Option, find, options_of, sentence, subclasses
from pi05_lightning.files.suggestion import suggestion

RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "run": (str | None, "The run's directory; by default that of the checkpoint, else runs/ and the time."),
    "ckpt_path": (str | None, "A checkpoint, a run's directory, or `last`."),
    "resume": (
        Literal["auto"] | None,
        "auto: go on with the newest checkpoint of --run if it has one, else start it.",
    ),
    "force": (bool, "Go on though the memory that is free is forecast not to be enough."),
}
"""Options of fit, validate, test and predict that are in no group: their type and what they mean."""
OF_FIT = "resume", "force"
"""Those that say something to fit alone; a run's configuration holds them for all."""
OF_THE_PARSER = {
    "-c, --config FILE": "a configuration, or a shipped one's name; several are merged in order, flags win",
    "--print_config": "print the resolved configuration and stop",
    "--seed_everything": "seed of everything that is drawn [0]",
}
TRAINER_DEFAULTS: dict[str, Any] = {
    # the data is an endless stream indexed by step, which each rank reads its own part of
    "max_epochs": -1,
    "use_distributed_sampler": False,
}
CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "filename": "{step:08d}",
    "auto_insert_metric_name": False,
    "every_n_train_steps": 1000,
    "save_last": "link",
    "enable_version_counter": False,
    "save_on_exception": True,
}
NOT_OF_A_CHUNK = {"robot", "execution_horizon", "inference_delay", "rtc", "replan_subtask_every", "on_failed_decode"}
"""Fields of `Acting` that a single chunk does not depend on; the robot, which the data says; and NaN for a chunk."""
LEFT_OUT = {"data": {"seed"}, "model": {"seed"}, "acting": NOT_OF_A_CHUNK}
"""What --seed_everything decides, and what does not concern a run."""
MOST_USED = {
    "trainer": (
        *("max_steps", "accelerator", "devices", "num_nodes", "strategy", "precision"),
        *("accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "check_val_every_n_epoch"),
        *("limit_val_batches", "log_every_n_steps", "logger", "callbacks"),
    ),
    "checkpoint": ("every_n_train_steps", "save_top_k", "monitor", "mode", "save_weights_only"),
}
"""Of groups with many options, those that the overview shows."""
EXAMPLES = {
    "fit": (
        "pi05 fit -c configs/tiny.yaml -c experiments/001_metaworld/config.yaml --run runs/mine",
        "pi05 fit --ckpt_path runs/mine",
    ),
    "validate": ("pi05 validate runs/mine",),
    "test": ("pi05 test runs/mine",),
    "predict": ("pi05 predict runs/mine --acting.num_steps 5",),
}


class OfTheParser(Exception):
    """A topic that only the parser can describe, which imports the class: the option's key, and the class."""


def width() -> int:
    return min(max(shutil.get_terminal_size((120, 24)).columns, 80), 120)


# --- fit, validate, test, predict


def run_help(command: str, about: str, topic: str) -> str:
    """What `--help`, or `--help.TOPIC`, prints. topic: a group, an option of it by its dotted key, or a class of it.

    Raises ValueError for what is no topic, and OfTheParser for a class that is not ours.
    """
    groups = {name: group for name, group in GROUPS.items() if name != "acting" or command == "predict"}
    if not topic:
        return overview(command, about, groups)
    name, _, rest = topic.partition(".")
    if name not in groups:
        raise ValueError(f"there is no --help.{topic}{suggestion(topic, groups)}: {', '.join(groups)}")
    return topic_help(name, name, find(groups[name].of), group_options(name), rest)


def group_options(group: str) -> list[Option]:
    """The options of a group, with the defaults that they have in a run."""
    defaults = {"trainer": TRAINER_DEFAULTS, "checkpoint": CHECKPOINT_DEFAULTS}.get(group, {})
    options = options_of(find(GROUPS[group].of))
    return [option.with_default(defaults) for option in options if option.name not in LEFT_OUT.get(group, ())]


def overview(command: str, about: str, groups: Mapping[str, Group]) -> str:
    usage = f"pi05 {command}{'' if command == 'fit' else ' [CHECKPOINT]'} [-c FILE …] [--KEY VALUE …]"
    lines = [f"usage: {usage}", "", about[0].upper() + about[1:] + ".", ""]
    lines += [f"  {example}" for example in EXAMPLES[command]]
    lines += ["", "Every option may stand in a file or be a flag; paths are relative to the working directory.", ""]
    lines += ["Run", *(row(name, text) for name, text in OF_THE_PARSER.items())]
    shown_here = (name for name in RUN_OPTIONS if command == "fit" or name not in OF_FIT)
    lines += [row(f"--{name}", RUN_OPTIONS[name][1]) for name in shown_here]
    for name, group in groups.items():
        options = {option.name: option for option in group_options(name)}
        shown = MOST_USED.get(name, options)
        left = len(options) - len(shown)
        lines += ["", f"{group.title} (--help.{name}{f': {left} more' if left else ''})"]
        lines += [row(f"--{name}.{key}", sentence(options[key].text), options[key].shown_default) for key in shown]
    lines += [
        "",
        "More about a group, an option, a class:",
        f"  pi05 {command} --help.model | --help.data.language | --help.data.sources.LeRobotConfig",
        f"  pi05 {command} --help.trainer.callbacks.EarlyStopping | --help.model.optimizer.torch.optim.SGD",
    ]
    return "\n".join(lines)


def row(name: str, text: str, default: str = "") -> str:
    """An option in one line, without a default that would fill it."""
    end = f" [{default}]" if 0 < len(default) < 20 else ""
    return f"  {name:<33} {textwrap.shorten(text, width() - 36 - len(end), placeholder=' …')}{end}"


# --- in full


def topic_help(key: str, asked: str, found: Found, options: list[Option], rest: str) -> str:
    """What a topic is about: the options of `found`, or what the rest of the topic names among them.

    key: what the options stand below.  asked: the topic so far.
    """
    if not rest:
        return described(key, asked, found, options)
    name, _, rest = rest.partition(".")
    option = next((option for option in options if option.name == name), None)
    if option is None:
        known = [option.name for option in options]
        raise ValueError(f"there is no --help.{below(asked, name)}{suggestion(name, known)}: {', '.join(known)}")
    key, asked = below(key, name), below(asked, name)
    for kind in own_types(option):
        if not kind.is_abstract:
            return topic_help(option.inside(key), asked, kind, options_of(kind), rest)
        known_classes = {of.name: of for of in subclasses(kind)}
        if of := known_classes.get(rest.rpartition(".")[2]):
            return described(f"{option.inside(key)}.init_args", asked, of, options_of(of))
        if not rest:
            classes = [row(name, of.summary) for name, of in known_classes.items()]
            last = f"Options of one: --help.{asked}.{next(iter(known_classes))}"
            return "\n".join([paragraph(f"--{key}", option.full), "", *classes, "", last])
    if rest:
        raise OfTheParser(asked, rest)
    return paragraph(f"--{key}", option.full)


def below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def own_types(option: Option) -> list[Found]:
    """The classes of this package that an option's type names."""
    return [kind for kind in option.types if kind.home.name.startswith("pi05_lightning.")]


def described(key: str, asked: str, found: Found, options: Iterable[Option]) -> str:
    """Every option in full."""
    lines = [f"{key}: {found.summary}" if found.summary else key, ""]
    for option in options:
        more = f" See --help.{asked}.{option.name}." if own_types(option) else ""
        lines.append(paragraph(f"--{key}.{option.name}", option.full + more))
    return "\n".join(lines)


def paragraph(name: str, text: str) -> str:
    return "\n".join([f"  {name}", textwrap.fill(text, width(), initial_indent=" " * 6, subsequent_indent=" " * 6)])


# --- the other commands


def function_of(command: str) -> Found:
    """What runs a command that is a function, as its text says; the words of its name are joined by `_`."""
    name = command.replace(" ", "_")
    return find(f"pi05_lightning.cli.{name}.{name}")


def command_options(function: Found) -> list[Option]:
    """What a command takes: the function's arguments, or the fields of the one dataclass that it is given."""
    options = options_of(function)
    if len(options) == 1 and options[0].types and options[0].types[0].is_dataclass:
        return options_of(options[0].types[0])
    return options


def command_help(command: str, topic: str) -> str:
    """What `--help`, or `--help.OPTION`, prints of a command that is a function.

    Raises ValueError for what is no topic, and OfTheParser for a class that is not ours.
    """
    function = function_of(command)
    options = command_options(function)
    if topic:
        return topic_help("", "", function, options, topic)
    given = [option for option in options if option.default is None and not option.keyword]
    names = "".join(f" {option.name}" for option in given)
    lines = [f"usage: pi05 {command}{names} [--OPTION VALUE …]", "", sentence(function.doc) + ".", ""]
    for option in options:
        lines.append(paragraph(option.name if option in given else f"--{option.name}", option.full))
    texts = {"--config FILE": "these options in a file", "--print_config": "print the options as they are, and stop"}
    return "\n".join([*lines, "", *(row(*text) for text in texts.items())])


def asked(args: Collection[str]) -> str | None:
    """The topic that arguments ask help about, empty for all of it; None where they ask for none."""
    for place, arg in enumerate(args):
        if arg in ("-h", "--help"):
            return ""
        if arg.startswith("--help."):
            topic = arg.removeprefix("--help.")
            following = [*args][place + 1 : place + 2]
            return ".".join([topic, *(word for word in following if not word.startswith("-"))])
    return None
