"""The README and docs/: what they show runs as written, and what they name exists."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.__main__ import HEADLINES, PARTS, RESULTS, kept
from benchmarks.harness import Row, processor, read_json
from benchmarks.peer import lerobot_sizes
from benchmarks.sizes import DEBUG
from pi05_lightning import Pi05DataModule, Pi05Policy
from pi05_lightning.cli import main as cli
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.processor import Language
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.module import Predicted
from pi05_lightning.training.callbacks.predictions import table
from tests.untrained import untrained_policy

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")])
KEYS = ["observation.state", "observation.gripper"]
ROBOT: dict[str, Any] = {"state_keys": KEYS, "action_keys": KEYS}
EXPERIMENT = ["configs/tiny.yaml", "experiments/001_metaworld/config.yaml"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every `pi05` command in code blocks and in backticks."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    found = [text.split() for text in (*lines, *spans) if text.startswith("pi05 ")]
    names = [" ".join(words[1:3]) for words in found]  # of two words, as `value fit`
    return [[w[0], name, *w[3:]] if name in cli.COMMANDS else w for w, name in zip(found, names, strict=True)]


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def dataset(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos` with its last episode for validation: a tenth of so few is none."""
    folder = Path(shutil.copytree(videos, tmp_path_factory.mktemp("split") / "videos"))
    file = folder / "meta" / "info.json"
    info = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**info, "splits": {"train": "0:4", "val": "4:5"}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint_like_the_demos(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, not trained, of a robot with four state and four action dimensions."""
    config = ModelConfig.preset("tiny")
    chunks = np.random.default_rng(0).uniform(-1, 1, (20, config.horizon, 4)).astype(np.float32)
    fast = tmp_path_factory.mktemp("fast")
    FastTokenizer.fit([chunks]).save(fast)
    return untrained_policy(tmp_path_factory.mktemp("policy"), dataset, config, data={"fast": fast}, **ROBOT)


@pytest.fixture(scope="module")
def lerobots_folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A π0.5 as LeRobot writes it, small and not trained, of the same robot."""
    folder = tmp_path_factory.mktemp("lerobot")
    language = Language(prompts=Prompts(clip_state=False), condition_on="task")
    ours = untrained_policy(folder / "ours", dataset, DEBUG, data={"language": language}, **ROBOT)
    with lerobot_sizes(DEBUG):
        convert(source=ours, target=folder / "pi05_base", format="lerobot")
    return folder / "pi05_base"


@pytest.fixture(scope="module")
def predictions_like_the_demos(
    checkpoint_like_the_demos: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `pi05 predict` writes of a source, of one batch."""
    policy, folder = Pi05Policy(checkpoint_like_the_demos), tmp_path_factory.mktemp("predictions")
    robot = LeRobotConfig(str(dataset), **ROBOT)
    data = Pi05DataModule({"robot": robot}, batch_size=4, num_workers=0, shapes=policy.processor.shapes)
    batch = next(iter(data.predict_dataloader()[0]))
    subtasks = [None] * len(batch.frames)
    predicted = Predicted(policy.predict_chunks(batch.frames, subtasks), subtasks)
    pq.write_table(table(batch, predicted), folder / "rank-0.parquet")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs_as_written(
    page: Path,
    checkpoint_like_the_demos: Path,
    lerobots_folder: Path,
    predictions_like_the_demos: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {
        "runs/demo/fit": checkpoint_like_the_demos,
        "runs/demo/fit/predictions/robot": predictions_like_the_demos,
        "runs/base": checkpoint_like_the_demos,
        "runs/mine": checkpoint_like_the_demos,
        "path/to/pi05_base": lerobots_folder,
        "runs/demo/data/robot": dataset,
        "path/to/dataset": dataset,
        "path/to/paligemma": "tiny",
    }
    images = {camera: np.zeros((3, 48, 64), dtype=np.uint8) for camera in ("top", "wrist")}
    observation = {"image": images, "state": np.zeros(4, dtype=np.float32), "task": "open the drawer"}
    running = np.zeros((2, 4), dtype=np.float32)
    names: dict[str, Any] = {"__name__": "readme", "observation": observation, "running": running}
    for code in blocks(page, "python"):
        for path, here in paths.items():
            code = code.replace(f'"{path}"', repr(str(here)))
        exec(compile(code, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_is_a_valid_configuration(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for code in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code, encoding="utf-8")
    for number, text in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        configs = [word for name in (*EXPERIMENT, str(file)) for word in ("-c", name)]
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", *configs, "--print_config"])
        assert ended.value.code == 0


SHORT = [
    f"--stages.{option}"
    for option in ("pretrain_steps=2", "pretrain.warmup_steps=1", "posttrain_steps=2", "posttrain.warmup_steps=1")
]


@pytest.fixture(scope="module")
def demos_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` has before it trains, of a few episodes."""
    folder = tmp_path_factory.mktemp("demo")
    few = ["--episodes", "3", "--val_episodes", "1", "--scenes", "4", "--num_workers", "1"]
    cli.main(["collect", str(folder / "data"), *few])
    cli.main(["tokenizer", str(folder / "data" / "robot"), "--out", str(folder / "fast"), "--horizon", "8"])
    return folder


def files_of(page: Path) -> dict[str, str]:
    """The files that a page shows as a whole, which say their names."""
    texts = [text for language in ("python", "yaml", "yml") for text in blocks(page, language)]
    return {name[1]: text for text in texts if (name := re.match(r"# ([\w-]+\.(?:py|yaml))\n", text))}


def trainings() -> list[Any]:
    """Blocks of commands that train with a file of their page; experience needs attempts, of tests/experience."""
    found = [(page, block) for page in PAGES for block in blocks(page, "sh") if "pi05 fit" in block]
    return [
        pytest.param(page, block, id=f"{page.stem}-{name}")
        for page, block in found
        for name in files_of(page)
        if f"-c {name}" in block and name != "experience.yaml"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "block"), trainings())
def test_documented_training_runs_through_its_stages(
    page: Path, block: str, demos_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in files_of(page).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    places = {
        "configs": ROOT / "configs",
        "experiments": ROOT / "experiments",
        "runs/demo": demos_data,
        "path/to/dataset": demos_data / "data" / "robot",
        "path/to/captions": demos_data / "data" / "web",
    }
    for name, place in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(place)
    for line in block.replace("\\\n", " ").splitlines():
        words = line.removeprefix("PYTHONPATH=. ").split()
        cli.main([*words[1:], *(SHORT if words[1] == "fit" else ())])


def test_recipe_in_the_readme_is_the_experiments() -> None:
    (excerpt,) = blocks(ROOT / "README.md", "yaml")
    whole = yaml.safe_load((ROOT / EXPERIMENT[1]).read_text(encoding="utf-8"))

    def is_within(part: Any, of: Any) -> bool:
        if not isinstance(part, dict):
            return part == of
        return isinstance(of, dict) and all(key in of and is_within(value, of[key]) for key, value in part.items())

    assert is_within(yaml.safe_load(excerpt), whole)


def test_processors_of_the_speed_table_are_named() -> None:
    rows = {row.name: row for part in PARTS for row in read_json(RESULTS / f"{part}.json")}
    said = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Speed\n")[2].partition("<!-- SPEED -->")[0]
    assert {name: rows[name].machine for name in HEADLINES if rows[name].machine not in said} == {}


def test_kept_rows_say_when_and_on_which_other_processor_they_were_measured() -> None:
    def rows(day: str, machine: str) -> list[Row]:
        return [Row("chunk", "", 1.0, 1.0, 1.0, 1.0, 1.0, "s", day, machine)]

    here = {"train": rows("2026-01-02", processor()), "fast": rows("2026-01-02", processor())}
    assert kept(here | {"stats": rows("2026-01-01", "a Xeon")}) == [
        "kept from 2026-01-01, on a Xeon: stats",
        "kept from 2026-01-02: train, fast",
    ]


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_every_command_is_in_the_readme_and_every_named_command_exists() -> None:
    known = {*cli.COMMANDS, *cli.TRAINER_COMMANDS}
    assert {words[1] for words in commands(ROOT / "README.md")} - {"COMMAND"} == known
    assert {words[1] for page in PAGES for words in commands(page)} - {"COMMAND"} == known


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_of_a_command_that_are_shown_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    options = set(re.findall(r"^ +--(\w+)", capsys.readouterr().out, re.MULTILINE))
    shown = [word for page in PAGES for words in commands(page) if words[1] == name for word in words]
    named = {word.removeprefix("--").partition(".")[0] for word in shown if word.startswith("--")}
    assert named <= options | {"help"}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
