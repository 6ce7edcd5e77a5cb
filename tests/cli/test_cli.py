"""The `pi05` command: finding commands, configurations and options, and refusing what it does not know."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pi05_lightning.cli.main import COMMANDS, TRAINER_COMMANDS, load, main
from pi05_lightning.files.shipped import shipped_configs


def rejected(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that is refused prints."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code not in (0, None)
    return capsys.readouterr().err + str(stopped.value.code)


def resolved(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """The configuration that a command line resolves to."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    commands = [*TRAINER_COMMANDS, *COMMANDS]
    assert [next(name for name in commands if line.startswith(f"  {name} ")) for line in listed] == commands


def test_ctrl_c_is_one_line_and_the_status_of_a_killed_process() -> None:
    command = [sys.executable, "-m", "pi05_lightning", "profile", "tiny", "--batch_size", "512"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the first table's title: it counts and then measures, for many seconds
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert told.strip() == "pi05 profile: interrupted"


WARNING = """
from pi05_lightning.cli.noise import silence_noise
from pi05_lightning.data.errors import Rejects
from pi05_lightning.data.samples import BadSampleCount
from pi05_lightning.types import Drawn
silence_noise()
Rejects("robot", "skip").add("episode 1", "found when opened", "", 1)
BadSampleCount(1.0).add(Drawn(names={}, text_tokens=0, frames=(), skipped=("found when drawn",)))
"""


@pytest.mark.parametrize(("rank", "opened"), [("0", 1), ("1", 0)])
def test_data_are_warned_of_by_the_first_rank_and_what_a_rank_draws_by_itself(
    rank: str, opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    said = subprocess.run([sys.executable, "-c", WARNING], capture_output=True, text=True, check=True).stderr
    assert said.count("found when opened") == opened
    assert said.count("found when drawn") == 1


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys; from pi05_lightning.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_help_is_there_within_two_seconds() -> None:
    command = [sys.executable, "-m", "pi05_lightning", "--help"]
    subprocess.run(command, capture_output=True, check=True)
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_where_the_table_says(command: str) -> None:
    assert callable(load(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code in (0, None)
    assert f"usage: pi05 {command}" in capsys.readouterr().out


def test_unknown_command_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'colect' (did you mean collect?)" in rejected(["colect"], capsys)


def test_unknown_option_of_a_command_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--quik (did you mean quick?)" in rejected(["demo", "--quik"], capsys)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--trainer.max_step=3", "trainer.max_steps"),
        ("--stages.flow_alhpa=3", "stages.flow_alpha"),
        ("--model.flow_draw=3", "model.flow_draws"),
    ],
)
def test_unknown_flag_suggests_the_near_key(
    flag: str, meant: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"(did you mean {meant}?)" in rejected(["fit", "-c", str(config), flag], capsys)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"modle": {"flow_draws": 3}}, "modle"),
        ({"stages": {"flow_alhpa": 3}}, "flow_alhpa"),
        ({"model": {"config": {"vision": {"widht": 3}}}}, "widht"),
    ],
)
def test_unknown_key_in_a_file_is_named(
    content: dict, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    assert named in rejected(["fit", "-c", str(file)], capsys)


def test_missing_configuration_names_those_that_are_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    message = rejected(["fit", "-c", "configs/tinny.yaml"], capsys)
    assert "configs/tinny.yaml" in message
    assert "configs/tiny.yaml" in message


def test_checkpoint_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.ckpt" in rejected(["validate", str(tmp_path / "absent.ckpt")], capsys)


def test_configurations_merge_key_by_key(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump({"stages": {"flow_alpha": 3.0}, "model": {"flow_draws": 2}}))
    stages = resolved(["fit", "-c", str(config), "-c", str(second)], capsys)["stages"]
    assert (stages["pretrain_steps"], stages["flow_alpha"]) == (4, 3.0)


def test_flags_win_over_files(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = resolved(["fit", "--stages.pretrain_steps", "7", "-c", str(config)], capsys)
    assert found["stages"]["pretrain_steps"] == 7


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.startswith("configs/model/")])
def test_shipped_configuration_is_found_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = ["configs/tiny.yaml", name] if name.startswith("experiments/") else [name]
    model = resolved(["fit", *(word for layer in layers for word in ("-c", layer))], capsys)["model"]
    assert model["init_from"] or model["config"]["vocab_size"]
