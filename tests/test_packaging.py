"""What a user gets: a wheel, and a source distribution, that work where nothing of the repository is."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pi05_lightning

ROOT = Path(__file__).parents[1]


def uv(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment with what was built and its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves its build folder beside what it builds
    for name in ("configs", "experiments", "pi05_lightning"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    uv("build", f"--{request.param}", "--out-dir", folder, source)
    (built,) = folder.glob("*.whl" if request.param == "wheel" else "*.tar.gz")
    environment = folder / "venv"
    uv("venv", "--python", sys.executable, environment)
    python = environment / "bin" / "python"
    uv("pip", "install", "--python", python, "--constraint", ROOT / "requirements.lock", built)
    return environment / "bin"


def pi05(installed: Path, folder: Path, *arguments: str) -> str:
    """What `pi05` of the installed wheel prints in a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "pi05"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_installed_package_answers_help(installed: Path, tmp_path: Path) -> None:
    assert "usage: pi05 COMMAND" in pi05(installed, tmp_path, "--help")


@pytest.mark.slow
def test_installed_package_brings_the_shipped_configurations(installed: Path, tmp_path: Path) -> None:
    layers = ("-c", "configs/tiny.yaml", "-c", "experiments/001_metaworld/config.yaml")
    assert "pretrain_steps: " in pi05(installed, tmp_path, "fit", *layers, "--print_config")


@pytest.mark.slow
def test_installed_package_brings_its_data_files(installed: Path, tmp_path: Path) -> None:
    script = (
        "from pi05_lightning.data.tokenizer import TextTokenizer; print(TextTokenizer.load('tiny').vocab_size);"
        "from pi05_lightning.sim.instructions import PARAPHRASES; print(PARAPHRASES.is_file())"
    )
    command = [str(installed / "python"), "-c", script]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["4096", "True"]


@pytest.mark.slow
def test_installed_package_runs_the_tutorial(installed: Path, tmp_path: Path) -> None:
    """With its simulator, and Jupyter to run it."""
    (built,) = (path for path in installed.parents[1].iterdir() if path.suffix in (".whl", ".gz"))
    wanted = (f"pi05_lightning[sim] @ {built.as_uri()}", "nbconvert", "ipykernel")
    uv("pip", "install", "--python", installed / "python", "--constraint", ROOT / "requirements.lock", *wanted)
    shutil.copy(ROOT / "docs" / "tutorial.ipynb", tmp_path)
    command = [str(installed / "python"), "-m", "nbconvert", "--execute", "--to", "notebook", "tutorial.ipynb"]
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_runs_elsewhere_that_a_link_leads_to_are_monitored_and_not_committed(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (elsewhere / "mine").mkdir(parents=True)
    (elsewhere / "mine" / "events.out.tfevents.1").touch()
    board = here / ".venv" / "bin" / "tensorboard"
    board.parent.mkdir(parents=True)
    board.write_text('#!/bin/sh\necho "$@"\n')
    board.chmod(0o755)
    for name in ("runs", "data"):
        (here / name).symlink_to(elsewhere)
    shutil.copy(ROOT / ".gitignore", here)

    def said(*words: str) -> str:
        return subprocess.run(words, cwd=here, check=True, capture_output=True, text=True).stdout

    made = ("make", "-f", str(ROOT / "Makefile"), "--old-file", ".venv/.setup", "monitor")
    assert "--logdir runs/mine" in said(*made)
    said("git", "init", "-q")
    assert said("git", "status", "--porcelain", "--untracked-files=all").split() == ["??", ".gitignore"]


def test_packages_bring_the_models_that_shipped_configurations_name() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    brought = {
        str(file.relative_to(ROOT))
        for folder in ("configs", "experiments")
        for pattern in setup["options.package_data"][f"pi05_lightning.{folder}"].split(", ")
        for file in (ROOT / folder).glob(pattern)
    }
    shipped = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("experiments/*/config.yaml")]
    named = {str(file.relative_to(ROOT)) for file in shipped}
    for file in shipped:
        model = (yaml.safe_load(file.read_text()).get("model") or {}) if "model" not in file.parts else {}
        if str(config := model.get("config", "")).endswith(".yaml"):
            named.add(config)
    assert "experiments/008_mt50/model.yaml" in named
    assert named <= brought


def test_versions_agree() -> None:
    """Of the package, its citation, its changelog, and of the plugin, which is made for this one."""
    (declared,) = re.findall(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert pi05_lightning.__version__ == declared
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {declared}\n" in (ROOT / "CHANGELOG.md").read_text()
    plugin = (ROOT / "plugins" / "lerobot_policy_pi05_lightning" / "pyproject.toml").read_text()
    assert f'"pi05-lightning=={declared}"' in plugin


def test_lock_holds_versions_and_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert lines
    assert all("==" in line and "/" not in line and "@" not in line for line in lines)
