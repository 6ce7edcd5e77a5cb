"""Whatever is at a path, the same four questions are answered."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy, StageSwitch
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.recipe import LossWeights, Recipe, StageOptions
from pi05_lightning.weights.abilities import UNKNOWN, Trained, trained
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.folder import ExportedFolder, save
from pi05_lightning.weights.lerobot import PREFIX, lerobot_tensors
from pi05_lightning.weights.lerobot_folder import LeRobotFolder
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.safetensors import save_tensors
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint
from tests.quiet_trainer import quiet_trainer
from tests.untrained import untrained_model

PRETRAIN = StageOptions(LossWeights(text=1, subtask=1), {"robot/qa": 0.5, "robot/hl_subtask": 0.5})
POSTTRAIN = StageOptions(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0})
CONFIG = ModelConfig.preset("debug")
Fit = Callable[..., Path]


@pytest.fixture(scope="module")
def fit(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Train for some steps of both stages; the run's directory, with one checkpoint in it."""

    def run(pretrain_steps: int, posttrain_steps: int, ckpt_path: Path | None = None, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        stages = StageSwitch(pretrain_steps, posttrain_steps, pretrain=PRETRAIN, posttrain=POSTTRAIN)
        trainer = quiet_trainer(stages, max_steps=options.pop("max_steps", -1), default_root_dir=folder)
        robot = LeRobotConfig(path=str(videos), val_fraction=0.2)
        data = Pi05DataModule({"robot": robot}, batch_size=2, num_workers=0)
        trainer.fit(Pi05Module(**({"config": CONFIG} | options)), data, ckpt_path=ckpt_path)
        (folder / "checkpoints").mkdir()
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
        return folder

    return run


@pytest.fixture(scope="module")
def both_stages(fit: Fit) -> Path:
    return fit(2, 1)


@pytest.fixture(scope="module")
def stage_1(fit: Fit) -> Path:
    return fit(2, 1, max_steps=2)


@pytest.fixture
def model() -> Pi05:
    return untrained_model()


def answers(weights: Weights, expected: dict[str, torch.Tensor]) -> None:
    """The first three answers agree with each other and with the tensors expected."""
    found = weights.tensors()
    assert weights.config() == CONFIG
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(tensor.dtype is torch.bfloat16 for tensor in weights.tensors(torch.bfloat16).values())
    assert weights.processor().shapes == CONFIG.shapes
    assert weights.abilities.robots == weights.processor().acting
    assert weights.model().config == CONFIG


# --- one of each kind


@pytest.mark.parametrize("at", [".", "checkpoints", "checkpoints/last.ckpt"])
def test_run_and_its_checkpoint(both_stages: Path, at: str) -> None:
    weights = locate(both_stages / at)
    assert isinstance(weights, TrainingCheckpoint)
    assert weights.path == both_stages / "checkpoints" / "last.ckpt"
    state = torch.load(weights.path, weights_only=True)["state_dict"]
    answers(weights, {name.removeprefix("model."): tensor for name, tensor in state.items()})
    abilities = weights.abilities
    assert (abilities.robots, abilities.stages) == (("robot",), {"pretrain": 2, "posttrain": 1})
    assert (abilities.flow, abilities.fast, abilities.subtasks) == (True, False, True)


def test_exported_folder_is_able_of_what_its_checkpoint_was(both_stages: Path, tmp_path: Path) -> None:
    Pi05Policy(both_stages).save_pretrained(tmp_path)
    weights = locate(tmp_path)
    assert isinstance(weights, ExportedFolder)
    answers(weights, locate(both_stages).tensors())
    assert weights.abilities == locate(both_stages).abilities


def test_what_no_policy_could_be_read_from_is_not_exported(both_stages: Path, tmp_path: Path) -> None:
    policy = Pi05Policy(both_stages)
    (tmp_path / "config.json").write_text('{"type": "pi05"}')
    with pytest.raises(ValueError, match="holds weights that were not exported here: name another folder"):
        policy.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"type": "pi05"}'
    policy.model.auxiliary["mine"] = torch.nn.Linear(2, 2)  # a head of one's own
    policy.save_pretrained(tmp_path / "out")
    answers(locate(tmp_path / "out"), locate(both_stages).tensors())
    policy.model.flow_head.mine = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unexpected: flow_head\.mine\.weight"):
        policy.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_an_export_without_room_leaves_no_policy_with_other_statistics(both_stages: Path, tmp_path: Path) -> None:
    policy = Pi05Policy(both_stages)
    policy.save_pretrained(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "model.safetensors").stat().st_size - 1, hard))
    try:
        with pytest.raises(ValueError, match=r"model.safetensors cannot be written .*: make room"):
            policy.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "config.json").exists()


def test_converted_checkpoint_is_able_of_what_it_was(stage_1: Path, tmp_path: Path) -> None:
    convert(source=stage_1, target=tmp_path / "ours")
    assert locate(tmp_path / "ours").abilities == locate(stage_1).abilities


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["lerobot", "openpi"])
def test_folder_of_lerobots_or_openpis(model: Pi05, tmp_path: Path, prefix: str) -> None:
    tensors = {
        prefix + name.removeprefix(PREFIX): tensor for name, tensor in lerobot_tensors(model.state_dict(), {}).items()
    }
    save_tensors(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(f'{{"chunk_size": {CONFIG.horizon}}}')
    weights = locate(tmp_path, tokenizer="tiny", vision_heads=CONFIG.vision.num_heads)
    assert isinstance(weights, LeRobotFolder)
    answers(weights, model.state_dict())
    abilities = weights.abilities
    assert (abilities.robots, abilities.stages) == (("robot",), {})
    assert (abilities.flow, abilities.fast, abilities.subtasks) == (True, False, False)


def test_cast_tensors_do_not_read_from_the_file(stage_1: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(stage_1 / "checkpoints" / "last.ckpt", tmp_path))
    tensors = locate(file).tensors(torch.float32)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


# --- what was trained


def test_checkpoint_of_stage_1_alone_says_that_flow_was_not_trained(stage_1: Path) -> None:
    abilities = locate(stage_1).abilities
    assert abilities.stages == {"pretrain": 2}
    assert (abilities.flow, abilities.subtasks) == (False, True)


def test_old_checkpoint_without_the_record_is_taken_as_able_and_resumed(
    stage_1: Path, fit: Fit, tmp_path: Path
) -> None:
    content = torch.load(stage_1 / "checkpoints" / "last.ckpt", weights_only=True)
    del content["pi05"]["trained"]
    torch.save(content, tmp_path / "old.ckpt")
    abilities = locate(tmp_path / "old.ckpt").abilities
    assert (abilities.stages, abilities.flow, abilities.subtasks) == ({}, True, True)
    assert Pi05Policy(tmp_path).robot == "robot"
    resumed = locate(fit(4, 1, tmp_path / "old.ckpt", max_steps=3))
    assert (resumed.abilities.stages, resumed.abilities.flow) == ({"pretrain": 1}, True)


def test_old_folder_without_the_record_is_taken_as_able(both_stages: Path, tmp_path: Path) -> None:
    Pi05Policy(both_stages).save_pretrained(tmp_path)
    (tmp_path / "trained.json").unlink()
    assert (locate(tmp_path).trained, locate(tmp_path).abilities.flow) == (UNKNOWN, True)


def test_resumed_run_counts_every_step_once(stage_1: Path, fit: Fit) -> None:
    resumed = locate(fit(2, 1, stage_1 / "checkpoints" / "last.ckpt"))
    assert resumed.trained == Trained({"pretrain": 2, "posttrain": 1}, {"text": 2, "subtask": 2, "flow": 1}, True)


def test_run_that_begins_with_others_weights_is_able_of_what_they_were(both_stages: Path, fit: Fit) -> None:
    begun = locate(fit(1, 0, init_from=str(both_stages)))
    assert (begun.abilities.stages, begun.abilities.flow) == ({"pretrain": 3, "posttrain": 1}, True)


def test_run_that_begins_with_weights_of_unknown_training_may_be_able(model: Pi05, fit: Fit, tmp_path: Path) -> None:
    save(tmp_path, model)
    begun = locate(fit(1, 0, init_from=str(tmp_path)))
    assert (begun.abilities.stages, begun.abilities.flow) == ({"pretrain": 1}, True)


@pytest.mark.parametrize(
    ("first", "end", "stages", "terms"),
    [
        (0, 0, {}, {}),
        (0, 3, {"pretrain": 3}, {"text": 3, "subtask": 3}),
        (3, 5, {"pretrain": 1, "posttrain": 1}, {"text": 1, "subtask": 2, "flow": 1}),
        (5, 9, {"posttrain": 4}, {"subtask": 4, "flow": 4}),
    ],
)
def test_steps_count_for_the_stage_and_the_terms_that_they_train(
    first: int, end: int, stages: dict[str, int], terms: dict[str, int]
) -> None:
    recipe = Recipe.of(4, 3, pretrain=PRETRAIN, posttrain=POSTTRAIN)
    assert trained(recipe, first, end) == Trained(stages, terms, complete=True)
