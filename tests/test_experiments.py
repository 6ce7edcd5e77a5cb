"""Every experiment and every shipped configuration trains: found by their names on disk, so that new ones are too."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.sizes import MID
from pi05_lightning.cli.main import main
from pi05_lightning.files.shipped import shipped_configs
from pi05_lightning.files.yaml_files import read_yaml
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.demonstrations.config import CollectConfig
from tools import experiment
from tools.experiment_recipes import RECIPES

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(folder.name for folder in ROOT.glob("experiments/*") if folder.is_dir())
DIFFERENCES = [name for name in EXPERIMENTS if (ROOT / "experiments" / name / "config.yaml").is_file()]
SCRIPTS = [name for name in EXPERIMENTS if (ROOT / "experiments" / name / "run.py").is_file()]
MODELS = [name for name in shipped_configs() if name.startswith("configs/model/")]
NEED_WEIGHTS = ["configs/finetune.yaml"]  # cli/test_training_options.py gives them
WHOLE = [name for name in shipped_configs() if name.startswith("configs/") and name not in MODELS + NEED_WEIGHTS]
TOO_LARGE = ["configs/model/base.yaml"]  # 3.6 billion parameters
SMALL = ["--data.batch_size", "4", "--data.num_workers", "0", "--data.val_samples", "2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's directory with the smallest data that has every modality, and its FAST tokenizer."""
    folder = tmp_path_factory.mktemp("demo")
    tasks = ("reach-v3", "drawer-open-v3")  # of which one alone may hold the gripper still
    collect(CollectConfig(folder / "data", tasks, episodes=2, val_episodes=1, scenes=2, num_workers=1))
    robot, fast = str(folder / "data" / "robot"), str(folder / "fast")
    main(["tokenizer", robot, "--out", fast, "--horizon", "8"])
    return folder


def fit(demo: Path, run: Path, configs: list[str], *flags: str) -> None:
    """One batch of training and one of validation."""
    data = demo / "data"
    paths = ["--data.sources.robot.path", f"{data}/robot", "--data.sources.web.path", f"{data}/web"]
    layers = [word for config in configs for word in ("-c", config)]
    quick = ["--data.fast", f"{demo}/fast", "--trainer.fast_dev_run", "true", *SMALL, *flags]
    main(["fit", *layers, "--run", str(run), *paths, *quick])


@pytest.mark.slow_cases
@pytest.mark.parametrize("stage", ["pretrain", "posttrain"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_experiment_trains(name: str, stage: str, demo: Path, tmp_path: Path) -> None:
    config = read_yaml(ROOT / "experiments" / name / "config.yaml")
    if config.get("stages", {}).get(f"{stage}_steps") == 0:
        pytest.skip(f"it has no {stage} stage")
    flags = [] if stage == "pretrain" else ["--stages.pretrain_steps", "0"]
    if config.get("data", {}).get("fast", "") is None:
        flags += ["--data.fast", "null"]
    if "bf16" in str(config.get("trainer", {}).get("precision")):  # minutes, where no instruction has it
        flags += ["--model.config", "debug"]
    fit(demo, tmp_path / "run", experiment.configs(name), *flags)


def test_bases_are_compared_in_the_mid_model() -> None:
    model = ModelConfig.preset(str(ROOT / "experiments" / "007_quantised_base" / "model.yaml"))
    assert replace(model, vocab_size=MID.vocab_size) == MID


@pytest.mark.parametrize("config", WHOLE)
def test_configuration_trains(config: str, demo: Path, tmp_path: Path) -> None:
    fit(demo, tmp_path / "run", [config])


@pytest.mark.slow_cases
@pytest.mark.parametrize("model", [name for name in MODELS if name not in TOO_LARGE])
def test_model_trains(model: str, demo: Path, tmp_path: Path) -> None:
    fit(demo, tmp_path / "run", ["configs/tiny.yaml"], "--model.config", str(ROOT / model))


@pytest.mark.parametrize("model", TOO_LARGE)
def test_large_model_can_be_built(model: str) -> None:
    built = Pi05.without_memory(ModelConfig.preset(Path(model).stem))
    assert sum(p.numel() for p in built.parameters()) > 3e9


def test_every_experiment_is_a_difference_or_a_script_or_a_recipe_of_its_own() -> None:
    assert sorted({*DIFFERENCES, *SCRIPTS, *(recipe.name for recipe in RECIPES)}) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_has_a_readme_with_hypothesis_command_and_verdict(name: str) -> None:
    text = (ROOT / "experiments" / name / "README.md").read_text(encoding="utf-8")
    assert all(heading in text for heading in ("## Hypothesis", "## Command", "## Results", "## Verdict"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_and_is_rolled_out(name: str, demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = {"fit": ("--flags", '["--steps=1","--batch_size=2"]'), "rollout": ("--episodes", "1")}
    for part, command in experiment.commands(name, 0, demo, run).items():
        subprocess.run([sys.executable, *command, *more.get(part, ())], check=True)
    success = json.loads((run / "rollout" / "rollout.json").read_text())["success"]
    assert {n for by_task in success.values() for _, n in by_task.values()} == {1}
