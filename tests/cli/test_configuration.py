"""The few keys that other commands read of a run's YAML have the values that `pi05 fit` gives them."""

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from pi05_lightning.cli.configuration import read_configuration
from pi05_lightning.cli.main import main
from pi05_lightning.cli.profile import RUN_KEYS
from pi05_lightning.data.sources.base import SourceConfig
from pi05_lightning.models.config import ModelConfig

KEYS = RUN_KEYS | {"data.sources": dict[str, SourceConfig]}


def fit_configuration(files: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """What `pi05 fit -c … --print_config` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *(word for file in files for word in ("-c", file)), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def plain(key: str, found: dict) -> Any:
    """A value of fit's configuration as `read_configuration` gives it; sources by the class and path alone."""
    value = reduce(dict.__getitem__, key.split("."), found)
    if key == "model.config":
        return ModelConfig.from_dict(value)
    if key == "data.sources":
        return {name: (source["class_path"], source["init_args"]["path"]) for name, source in value.items()}
    return value


def comparable(key: str, value: Any) -> Any:
    if key == "data.sources":
        return {
            name: (f"{type(source).__module__}.{type(source).__qualname__}", source.path)
            for name, source in value.items()
        }
    return value


@pytest.fixture
def layer(tmp_path: Path) -> str:
    """A file that changes something in every group, deep inside the model and one source of two."""
    source = {"class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig", "init_args": {"path": "elsewhere"}}
    content = {
        "model": {"config": {"vision": {"num_keypoints": 64}}, "knowledge_insulation": True},
        "data": {"batch_size": 5, "sources": {"other": source}},
        "trainer": {"precision": "bf16-mixed"},
    }
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "layer.yaml")


def check_equal(files: list[str], found: dict) -> None:
    ours = read_configuration(files, KEYS)
    given = {key for key in KEYS if ours[key] is not None}
    assert {"model.config", "data.batch_size", "data.sources"} <= given
    assert {key: comparable(key, ours[key]) for key in given} == {key: plain(key, found) for key in given}


def test_shipped_file_is_read_as_fit_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    check_equal(["configs/tiny.yaml"], fit_configuration(["configs/tiny.yaml"], capsys))


def test_files_merge_as_in_fit(layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["configs/tiny.yaml", layer]
    found = fit_configuration(files, capsys)
    assert (found["model"]["config"]["vision"]["num_keypoints"], list(found["data"]["sources"])) == (64, ["other"])
    check_equal(files, found)


def test_configuration_that_a_run_saved_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit_configuration(["configs/tiny.yaml"], capsys)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    check_equal([str(tmp_path / "config.yaml")], found)


def test_key_that_no_file_has_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {devices: 2}\nmy_own: {thing: 3}\n")
    assert read_configuration([str(tmp_path / "config.yaml")], {"data.batch_size": int})["data.batch_size"] is None


def test_file_that_is_missing_is_told_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"there is no file absent\.yaml; shipped are configs/desk\.yaml"):
        read_configuration(["absent.yaml"], KEYS)
