"""`pi05 COMMAND --help` is short, is there at once, and says what the parser itself takes."""

import re
import resource
import subprocess
import sys
from typing import Any

import pytest
import yaml

from pi05_lightning.cli.help import LEFT_OUT, RUN_OPTIONS, TRAINER_DEFAULTS, group_options
from pi05_lightning.cli.layers import GROUPS
from pi05_lightning.cli.main import COMMANDS, TRAINER_COMMANDS, call, load, main
from pi05_lightning.cli.signatures import find, in_yaml, options_of

ALL = [*TRAINER_COMMANDS, *COMMANDS]


def printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def parsed(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Every option that the parser of a command has, with its default."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([command, "--print_config"])
    assert stopped.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("command", ALL)
def test_help_of_a_command_takes_less_than_three_seconds_and_two_screens(command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "pi05_lightning", command, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert len(done.stdout.splitlines()) <= 120
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("topic", ["trainer", "data.language", "data.sources.LeRobotConfig", "model.config.vision"])
def test_help_of_a_topic_waits_for_no_torch(topic: str) -> None:
    script = (
        "import sys; from pi05_lightning.cli.main import main;"
        f"import atexit; atexit.register(lambda: print('torch' in sys.modules)); main(['fit', '--help.{topic}'])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_groups_of_a_run_have_the_options_and_defaults_of_the_parser(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = parsed(command, capsys)
    assert set(found) - set(GROUPS) == {"seed_everything", *RUN_OPTIONS}
    for group in GROUPS.keys() & found.keys():
        options = {option.name: option for option in group_options(group)}
        assert set(found[group]) - LEFT_OUT.get(group, set()) == set(options)
        told = {name: option.default for name, option in options.items() if option.default and name != "optimizer"}
        assert told == {name: in_yaml(found[group][name]) for name in told}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_options_of_the_parser(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(load(command), ["--help"], prog=f"pi05 {command}")
    usage = capsys.readouterr().out.partition("\n\n")[0]
    shown = printed([command, "--help"], capsys)
    names = set(re.findall(r"^  (?:--)?(\w+)", shown, re.MULTILINE)) - {"config", "print_config"}
    arguments = re.findall(r"(?<=\s)(\w+)(?=(?:\s+\w+)*$)", usage)
    assert names == {*re.findall(r"--(\w+)", usage), *arguments} - {"config"}


def test_help_puts_what_is_ours_first_and_the_trainer_last(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(["fit", "--help"], capsys)
    assert shown.index("--run") < shown.index("--data.batch_size") < shown.index("--trainer.max_steps")
    assert "--help.trainer" in shown
    assert "--trainer.barebones" not in shown
    assert "--trainer.barebones" in printed(["fit", "--help.trainer"], capsys)


def test_default_that_a_run_has_of_its_own_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert TRAINER_DEFAULTS["max_epochs"] == -1
    shown = printed(["fit", "--help.trainer"], capsys)
    assert "default: -1" in shown[shown.index("--trainer.max_epochs") :][:400]


def test_help_is_given_beside_other_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["fit", "-c", "configs/tiny.yaml", "--help"], capsys) == printed(["fit", "--help"], capsys)


def test_sources_are_listed_and_each_has_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "VisionTextConfig" in printed(["fit", "--help.data.sources"], capsys)
    shown = printed(["fit", "--help.data.sources", "VisionTextConfig"], capsys)
    names = [option.name for option in options_of(find("pi05_lightning.data.sources.vision_text.VisionTextConfig"))]
    assert all(f"--data.sources.NAME.init_args.{name}\n" in shown for name in names)


@pytest.mark.parametrize("command", ["collect", "rollout"])
def test_simulators_are_listed_and_each_has_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    listed = printed([command, "--help.env"], capsys)
    assert all(re.search(f"^  {name} ", listed, re.MULTILINE) for name in ("Desk", "MetaWorld"))
    assert "DemonstratorConfig " not in listed.replace("DemonstratorConfig of", "")
    assert "--env.init_args.same_states" in printed([command, "--help.env", "Desk"], capsys)


@pytest.mark.parametrize(
    "topic", ["--help.trainer.callbacks.EarlyStopping", "--help.model.optimizer.torch.optim.AdamW"]
)
def test_options_of_any_class_are_shown(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", topic])
    assert stopped.value.code in (0, None)
    key = topic.removeprefix("--help.").rsplit(".", 1 if "callbacks" in topic else 3)[0]
    assert f"--{key}.{'patience' if 'callbacks' in topic else 'weight_decay'}" in capsys.readouterr().out


def test_topic_that_there_is_not_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(did you mean trainer?)" in refused(["fit", "--help.trainr"], capsys)
    assert "(did you mean language?)" in refused(["fit", "--help.data.langage"], capsys)


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_no_arguments_are_answered_with_what_to_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused([command], capsys)
    assert f"Every option: pi05 {command} --help" in message
    assert len(message.splitlines()) == 2


def test_the_first_of_two_words_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.findall(r"^  (value \w+)", printed(["value", "--help"], capsys), re.MULTILINE) == [
        "value fit",
        "value label",
    ]
    assert "value label" in refused(["value"], capsys)
