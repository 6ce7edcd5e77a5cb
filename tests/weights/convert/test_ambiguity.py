"""Where a folder says two things, neither is taken: an error lists them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.convert import convert
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.sim.simulators import LeRobotEnv
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot_processor import ACTION, STATE
from pi05_lightning.weights.locate import locate

from .conftest import ACTION_DIM, CONFIG, STATE_DIM, Copy, between_processors


@pytest.fixture
def folder(copy: Copy) -> Path:
    """LeRobot's checkpoint, to change."""
    return copy(lambda tensors: None)


@pytest.fixture
def openpi(folder: Path) -> Path:
    """The same with openpi's statistics of two robots; the second's actions reach a hundred times as far."""
    for file in folder.glob("policy_*"):
        file.unlink()
    for name, reach in (("franka", 1.0), ("ur5", 100.0)):
        stats = {
            key: {"q01": [-reach] * dims, "q99": [reach] * dims}
            for key, dims, reach in (("state", STATE_DIM, 1.0), ("actions", ACTION_DIM, reach))
        }
        (folder / "assets" / name).mkdir(parents=True)
        (folder / "assets" / name / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return folder


def change_steps(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    file = folder / "policy_preprocessor.json"
    values = json.loads(file.read_text())
    change(values["steps"])
    file.write_text(json.dumps(values))


def of(steps: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(step for step in steps if step["registry_name"] == name)


# --- robots


def test_openpis_statistics_of_several_robots_need_a_name(openpi: Path) -> None:
    with pytest.raises(ValueError, match="several robots, franka, ur5: name one"):
        Pi05Policy(openpi, tokenizer="tiny")


def test_openpis_policy_acts_in_the_units_of_the_robot_that_is_named(openpi: Path, tmp_path: Path) -> None:
    images = {camera: np.zeros((3, 9, 9), np.uint8) for camera in ("top", "wrist")}
    observation = {"image": images, "state": np.zeros(STATE_DIM), "task": "open"}
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    convert(source=openpi, target=tmp_path / "ur5", tokenizer="tiny", robot="ur5")
    franka = Pi05Policy(openpi, tokenizer="tiny", robot="franka").predict_chunk(observation, noise)
    for ur5 in (Pi05Policy(openpi, tokenizer="tiny", robot="ur5"), Pi05Policy(tmp_path / "ur5")):
        np.testing.assert_allclose(ur5.predict_chunk(observation, noise), 100 * franka, rtol=1e-4)


def test_openpis_weights_without_a_tokenizer_are_not_written_for_lerobot(openpi: Path, tmp_path: Path) -> None:
    values = {"action_dim": CONFIG.action_dim, "action_horizon": CONFIG.horizon}
    (openpi / "config.json").write_text(json.dumps(values))
    save(tmp_path / "ours", locate(openpi).model())
    (tmp_path / "ours" / "lerobot").mkdir()
    shutil.copyfile(openpi / "config.json", tmp_path / "ours" / "lerobot" / "config.json")
    save_file({}, tmp_path / "ours" / "lerobot" / "unread.safetensors")
    with pytest.raises(ValueError, match="came from openpi and without a tokenizer"):
        convert(source=tmp_path / "ours", target=tmp_path / "out", format="lerobot")


# --- statistics


def test_statistics_of_openpi_and_of_lerobot_in_one_folder_are_listed(folder: Path) -> None:
    (folder / "assets" / "arm").mkdir(parents=True)
    (folder / "assets" / "arm" / "norm_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"keep one kind .*norm_stats\.json.*policy_preprocessor"):
        locate(folder).processor()


def test_statistics_that_an_older_export_left_behind_are_not_read(folder: Path) -> None:
    expected = locate(folder).processor().to_dict()
    (file,) = folder.glob("policy_preprocessor*.safetensors")
    tensors = {key: 100 * tensor for key, tensor in load_file(file).items()}
    save_file(tensors, folder / "policy_preprocessor_step_9_normalizer_processor.safetensors")
    assert locate(folder).processor().to_dict() == expected


def test_two_files_of_statistics_without_the_processor_that_names_one_are_refused(folder: Path) -> None:
    (file,) = folder.glob("policy_preprocessor*.safetensors")
    tensors = {key: 100 * tensor for key, tensor in load_file(file).items()}
    save_file(tensors, folder / "policy_preprocessor_step_9_normalizer_processor.safetensors")
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(ValueError, match=r"step_9_normalizer.*holds other statistics"):
        locate(folder, tokenizer="tiny").processor()


def test_processors_that_differ_in_the_actions_range_are_refused(folder: Path) -> None:
    (file,) = folder.glob("policy_postprocessor*.safetensors")
    save_file({key: 100 * tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"differ in the statistics action\.q"):
        locate(folder).processor()


@pytest.mark.parametrize("mode", ["MIN_MAX", "IDENTITY", "MEAN_STD"])
def test_way_to_normalise_is_the_processors_as_it_is_for_lerobot(folder: Path, mode: str) -> None:
    """Of which config.json says otherwise."""
    for name, step in (("policy_preprocessor", "normalizer"), ("policy_postprocessor", "unnormalizer")):
        file = folder / f"{name}.json"
        values = json.loads(file.read_text())
        of(values["steps"], f"{step}_processor")["config"]["norm_map"] |= {"STATE": mode, "ACTION": mode}
        file.write_text(json.dumps(values))
        (weights,) = folder.glob(f"{name}*.safetensors")
        tensors = load_file(weights)
        ranges = {key.replace("q01", "min").replace("q99", "max"): 2 * x for key, x in tensors.items()}
        for part in (STATE, ACTION):
            mean, std = (x.clone() for x in (tensors[f"{part}.q01"], tensors[f"{part}.q99"].abs()))
            if part == STATE:
                mean[1], std[1] = -0.2, 0.0  # a joint that is locked
            ranges |= {f"{part}.mean": mean, f"{part}.std": std}
        save_file(tensors | ranges, weights)
    observation = {
        "image": {camera: torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8) for camera in ("top", "wrist")},
        "state": torch.tensor([0.1, -0.2, 0.9, 0.4]),
        "task": "open",
    }
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    _, expected = between_processors(folder)(observation, noise)
    found = torch.from_numpy(Pi05Policy(folder).predict_chunk(observation, noise))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_processors_that_differ_in_the_actions_mode_are_refused(folder: Path) -> None:
    file = folder / "policy_postprocessor.json"
    values = json.loads(file.read_text())
    of(values["steps"], "unnormalizer_processor")["config"]["norm_map"] |= {"ACTION": "MIN_MAX"}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="ACTION is normalised by QUANTILES and made real units by MIN_MAX"):
        locate(folder).processor()


def test_statistics_of_the_second_processor_alone_are_refused(folder: Path) -> None:
    (file,) = folder.glob("policy_preprocessor*.safetensors")
    file.unlink()
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(ValueError, match=r"action\.q.* are in its policy_postprocessor.json alone"):
        locate(folder, tokenizer="tiny").processor()


# --- processors


def test_steps_that_are_not_converted_are_listed(folder: Path) -> None:
    change_steps(folder, lambda steps: steps.insert(2, {"registry_name": "libero_processor", "config": {}}))
    with pytest.raises(ValueError, match="steps that are not converted: libero_processor"):
        locate(folder).processor()


def test_relative_actions_of_the_processor_alone_are_refused(folder: Path) -> None:
    step = {"registry_name": "relative_actions_processor", "config": {"enabled": True}}
    change_steps(folder, lambda steps: steps.insert(2, step))
    with pytest.raises(ValueError, match=r"use_relative_actions is false in config\.json, and relative_actions"):
        locate(folder).processor()


def test_renamed_observations_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = {"observation.images.front": "observation.images.top"}
    change_steps(folder, lambda steps: of(steps, "rename_observations_processor")["config"].update(rename_map=names))
    convert(source=folder, target=tmp_path / "ours")
    assert "LeRobot renames observations, {'observation.images.front'" in capsys.readouterr().out


def test_other_number_of_euler_steps_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_inference_steps": 5}))
    convert(source=folder, target=tmp_path / "ours")
    assert "give the policy num_steps 5" in capsys.readouterr().out


@pytest.mark.parametrize(("length", "said"), [(48, True), (200, False)])
def test_length_that_prompts_are_cut_to_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, length: int, said: bool
) -> None:
    change_steps(folder, lambda steps: of(steps, "tokenizer_processor")["config"].update(max_length=length))
    convert(source=folder, target=tmp_path / "ours")
    assert (f"LeRobot cuts prompts to {length} tokens" in capsys.readouterr().out) == said


def test_two_tokenizers_are_listed(folder: Path, tmp_path: Path) -> None:
    step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "another"}}
    change_steps(folder, lambda steps: steps.append(step))
    with pytest.raises(ValueError, match=r"names the tokenizers .*another: say which with --tokenizer"):
        locate(folder).processor()
    with pytest.raises(ValueError, match="say which with --tokenizer"):
        convert(source=folder, target=tmp_path / "ours")
    assert locate(folder, tokenizer="tiny").processor().acting == ("robot",)


def test_a_damaged_preprocessor_stops_a_conversion(folder: Path, tmp_path: Path) -> None:
    (folder / "policy_preprocessor.json").write_text('{"steps": [')
    with pytest.raises(ValueError, match=r"policy_preprocessor\.json is not valid JSON"):
        convert(source=folder, target=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- weights


def test_weights_in_one_file_and_in_several_are_refused(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weights twice, in model\.safetensors and .*index\.json"):
        locate(folder)


@pytest.mark.parametrize("place", ["last.ckpt", "checkpoints/last.ckpt"])
def test_weights_beside_checkpoints_are_refused(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).touch()
    with pytest.raises(ValueError, match=r"weights of its own, and the checkpoints last\.ckpt"):
        locate(folder)


@pytest.mark.slow
def test_rollout_of_a_folder_that_names_no_tokenizer_here_takes_one(
    folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    change_steps(folder, lambda steps: of(steps, "tokenizer_processor")["config"].pop("tokenizer_name"))
    env = LeRobotEnv(
        "metaworld", options={"task": "reach-v3"}, cameras={"top": "image", "wrist": "image"}, action_repeat=1
    )
    options: dict[str, Any] = {"env": env, "modes": ("policy",), "episodes": 1, "videos": 0, "max_seconds": 0.05}
    with pytest.raises(ValueError, match="no tokenizer at google/paligemma"):
        rollout(folder, out=tmp_path, **options)
    result = rollout(folder, out=tmp_path, tokenizer=str(tokenizer), max_state_distance=None, num_workers=1, **options)
    assert result["success"]["policy"]["reach-v3"][1] == 1
