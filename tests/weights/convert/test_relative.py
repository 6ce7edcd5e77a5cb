"""Relative actions, as LeRobot trains them and as we do: the same dims, and the same actions either way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.processor import AbsoluteActionsProcessorStep, PolicyProcessorPipeline, RelativeActionsProcessorStep
from torch import Tensor

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.transforms import RelativeActions

from .conftest import ACTION_DIM, CONFIG, Copy, export, open_lerobot

NAMES = ["shoulder.pos", "Gripper.pos", "elbow.pos"]
OBSERVATION = {
    "image": {name: np.full((3, 40, 30), 50 * i, np.uint8) for i, name in enumerate(("top", "wrist"))},
    "state": np.array([0.2, 0.3, -0.4, 1.5], np.float32),
    "task": "open the drawer",
}
CASES = {
    "all_but_the_gripper": (["gripper"], NAMES, (0, 2)),
    "all_where_nobody_named_them": (["gripper"], None, (0, 1, 2)),
    "all": ([], NAMES, (0, 1, 2)),
}
Chunk = Callable[[Tensor], np.ndarray]


@pytest.fixture
def relative(copy: Copy) -> Callable[..., Path]:
    """LeRobot's checkpoint as its training with `use_relative_actions` writes it."""

    def written(excluded: list[str], names: list[str] | None) -> Path:
        folder = copy(lambda tensors: None)
        config = PreTrainedConfig.from_pretrained(folder)
        config.use_relative_actions, config.relative_exclude_joints = True, excluded
        config.action_feature_names = names
        config._save_pretrained(folder)
        before, after = make_pre_post_processors(config, str(folder))
        step = RelativeActionsProcessorStep(True, excluded, names)
        for pipeline, place, new in ((before, 2, step), (after, 1, AbsoluteActionsProcessorStep(True, step))):
            steps = [*pipeline.steps[:place], new, *pipeline.steps[place:]]
            PolicyProcessorPipeline(steps=steps, name=pipeline.name).save_pretrained(folder)
        return folder

    return written


def by_lerobot(folder: Path, tokenizer: Path) -> Chunk:
    """A chunk by stock LeRobot's policy between the folder's own processors, from noise."""
    policy = open_lerobot(folder)
    named = {"tokenizer_processor": {"tokenizer_name": str(tokenizer)}}
    before, after = make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=named)

    def chunk(noise: Tensor) -> np.ndarray:
        images = {f"observation.images.{k}": torch.from_numpy(v).float() / 255 for k, v in OBSERVATION["image"].items()}
        batch = before(
            {**images, "observation.state": torch.from_numpy(OBSERVATION["state"]), "task": OBSERVATION["task"]}
        )
        return after(policy.predict_action_chunk(batch, noise=noise[None])[0]).numpy()

    return chunk


@pytest.mark.parametrize(("excluded", "names", "dims"), CASES.values(), ids=CASES.keys())
def test_lerobots_relative_actions_are_the_policys(
    relative: Callable[..., Path],
    tokenizer: Path,
    excluded: list[str],
    names: list[str] | None,
    dims: tuple[int, ...],
) -> None:
    folder = relative(excluded, names)
    policy = Pi05Policy(folder)
    assert policy.processor.robots[policy.robot].relative == RelativeActions(dims, dims)
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    expected = by_lerobot(folder, tokenizer)(noise)
    np.testing.assert_allclose(policy.predict_chunk(OBSERVATION, noise), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [(0, 2), tuple(range(ACTION_DIM))], ids=["some", "all"])
def test_our_relative_actions_are_lerobots(ours: Path, tokenizer: Path, tmp_path: Path, dims: tuple[int, ...]) -> None:
    policy = Pi05Policy(ours)
    robots = policy.processor.robots
    robots[policy.robot] = replace(robots[policy.robot], relative=RelativeActions(dims, dims))
    policy.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "out")
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    expected = Pi05Policy(tmp_path / "trained").predict_chunk(OBSERVATION, noise)
    found = by_lerobot(tmp_path / "out", tokenizer)(noise)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    again = Pi05Policy(tmp_path / "out", tokenizer=str(tokenizer))
    assert again.processor.robots[again.robot].relative == RelativeActions(dims, dims)


def test_round_trip_of_relative_actions_gives_the_same_files(
    relative: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = relative(["gripper"], NAMES)
    convert(source=folder, target=tmp_path / "ours")
    assert "LeRobot's select_action adds to every relative action the state of its own step" in capsys.readouterr().out
    export(tmp_path / "ours", tmp_path / "back")
    for file in folder.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_config_and_processors_that_disagree_are_refused(relative: Callable[..., Path]) -> None:
    folder = relative(["gripper"], NAMES)
    file = folder / "policy_postprocessor.json"
    values = json.loads(file.read_text())
    step = next(step for step in values["steps"] if step["registry_name"] == "absolute_actions_processor")
    step["config"]["enabled"] = False
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"use_relative_actions is true in config\.json, and .* enabled otherwise"):
        Pi05Policy(folder)
