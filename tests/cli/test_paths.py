"""Every path is relative to the working directory, whichever file says it; a model has a name."""

from pathlib import Path

import pytest
import yaml

from pi05_lightning.cli.main import main
from pi05_lightning.cli.profile import read_run
from pi05_lightning.files.shipped import find_model, shipped_models
from pi05_lightning.models.config import ModelConfig

from .test_cli import rejected, resolved


@pytest.fixture
def elsewhere(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration without a model in a folder `there`, next to `here`, which is the working directory."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    content = yaml.safe_load(config.read_text())
    del content["model"]
    file = tmp_path / "there" / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path / "here")
    return file


@pytest.mark.parametrize("place", ["notes.txt/x", "/proc/x"])
@pytest.mark.parametrize(
    "command",
    [
        ["tokenizer", "data", "--out"],
        ["export", "run", "--out"],
        ["push", "run", "user/name", "--dry_run", "--out"],
        ["convert", "--source", "run", "--target"],
        ["experience", "--policy=run", "--demonstrations=[data]"],
        ["value", "fit", "--policy=run"],
        ["value", "label", "run", "--out"],
        ["report", "run", "--out"],
        ["demo", "--out"],
        ["collect"],
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    command: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"(cannot write to|cannot be made)"):
        main([*command, f"{place}/a.html" if command[0] == "report" else place])


def write(file: Path, **content: object) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", shipped_models())
def test_model_is_named_in_yaml_in_a_flag_and_in_python(
    name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ModelConfig.preset(name)
    layer = write(elsewhere.with_name("model.yaml"), model={"config": name})
    for more in (["-c", str(layer)], ["--model.config", name], [f"--model.config={name}"]):
        found = resolved(["fit", "-c", str(elsewhere), *more], capsys)["model"]["config"]
        assert ModelConfig.from_dict(found) == expected
    assert read_run([name])[0] == read_run([str(layer)])[0] == expected


def test_later_layer_changes_a_named_model(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = write(elsewhere.with_name("model.yaml"), model={"config": "debug"})
    flags = ["--model.config.horizon", "3"]
    found = resolved(["fit", "-c", str(elsewhere), "-c", str(layer), *flags], capsys)["model"]["config"]
    assert (found["horizon"], found["vocab_size"]) == (3, ModelConfig.preset("debug").vocab_size)


@pytest.mark.parametrize("how", ["file", "flag"])
def test_wrong_model_is_told_the_shipped_ones(how: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = write(elsewhere.with_name("model.yaml"), model={"config": "tinny"})
    more = ["-c", str(layer)] if how == "file" else ["--model.config", "tinny"]
    assert "shipped models are base, debug, tiny" in rejected(["fit", "-c", str(elsewhere), *more], capsys)
    with pytest.raises(ValueError, match="shipped models are base, debug, tiny"):
        ModelConfig.preset("tinny")


def test_model_file_is_relative_to_the_working_directory(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(elsewhere, **yaml.safe_load(elsewhere.read_text()), model={"config": "mine.yaml"})
    (Path.cwd() / "mine.yaml").write_text(find_model("debug").read_text())
    (elsewhere.parent / "mine.yaml").write_text(find_model("tiny").read_text())
    found = resolved(["fit", "-c", str(elsewhere)], capsys)["model"]["config"]
    assert ModelConfig.from_dict(found) == ModelConfig.preset("debug") == read_run([str(elsewhere)])[0]


def test_groups_in_files_of_their_own_are_relative_to_the_working_directory(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a file in a file in a file, and one that a flag names
    write(elsewhere, **yaml.safe_load(elsewhere.read_text()), model="../there/group.yaml", ema="ema.yaml")
    write(elsewhere.with_name("group.yaml"), config="mine.yaml", flow_draws=3)
    (Path.cwd() / "mine.yaml").write_text(find_model("debug").read_text())
    write(Path.cwd() / "ema.yaml", decay=0.5)
    write(elsewhere.with_name("trainer.yaml"), max_steps=7)
    found = resolved(["fit", "-c", str(elsewhere), "--trainer", "../there/trainer.yaml"], capsys)
    assert (found["model"]["flow_draws"], found["ema"]["decay"], found["trainer"]["max_steps"]) == (3, 0.5, 7)
    assert ModelConfig.from_dict(found["model"]["config"]) == ModelConfig.preset("debug")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.config", "sub/mine.yaml"),
        ("model.init_from", "sub/of/weights"),
        ("data.fast", "sub/of/fast"),
        ("data.tokenizer", "sub/of/words"),
        ("data.sources.web.init_args.path", "sub/of/data.parquet"),
        ("ckpt_path", "sub/of/run"),
    ],
)
def test_path_that_is_only_beside_its_file_says_so(
    key: str, value: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere.parent / value).mkdir(parents=True)
    content = yaml.safe_load(elsewhere.read_text()) | {"model": {"config": "debug"}}
    *groups, last = key.split(".")
    place = content
    for group in groups:
        place = place[group]
    place[last] = value
    write(elsewhere, **content)
    message = rejected(["fit", "-c", str(elsewhere)], capsys)
    assert f"{value} (in {Path.cwd()})" in message
    assert f"{key}: paths are relative to the working directory" in message
    assert f"write {elsewhere.parent / value}" in message


@pytest.mark.slow
def test_saved_configuration_means_the_same_wherever_it_lies(
    config: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(captions.parent)
    relative = ["--data.sources.web.init_args.path", captions.name, "--model.config", "debug"]
    main(["fit", "-c", str(config), *relative, "--run", "run"])
    monkeypatch.setenv("PWD", str(captions.parent))
    main(["fit", "-c", "run/config.yaml", "--run", str(tmp_path / "again")])
    main(["validate", "run"])
    assert "web/web_caption" in capsys.readouterr().out
