"""What stops a conversion, and that it is said by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pi05_lightning.cli.convert import convert
from pi05_lightning.cli.main import call
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot import (
    EXPERT_LM_HEAD,
    PREFIX,
    to_lerobot,
)
from pi05_lightning.weights.locate import locate

from .conftest import Copy


def test_missing_unexpected_and_misshaped_keys_are_listed_by_lerobots_names(copy: Copy) -> None:
    layer = "model.paligemma_with_expert.paligemma.model.language_model.layers"

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{layer}.1.mlp.up_proj.weight"]
        del tensors["model.paligemma_with_expert.gemma_expert.model.norm.dense.bias"]
        tensors[f"{layer}.0.self_attn.v_proj.weight"] = torch.zeros(8, 48)
        tensors["model.paligemma_with_expert.lora_A.weight"] = torch.zeros(2)

    with pytest.raises(ValueError, match="4 keys do not fit") as error:
        locate(copy(damage)).tensors()
    for expected in (
        f"missing: {layer}.1.mlp.up_proj.weight [64, 48]",
        "missing: model.paligemma_with_expert.gemma_expert.model.norm.dense.bias [96]",
        f"misshaped: {layer}.0.self_attn.v_proj.weight is [8, 48], expected [16, 48]",
        "unexpected: model.paligemma_with_expert.lora_A.weight [2]",
    ):
        assert expected in str(error.value)


def test_every_key_of_a_missing_layer_is_listed(copy: Copy) -> None:
    last = "model.paligemma_with_expert.gemma_expert.model.layers.1."

    def cut(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(last)]:
            del tensors[key]

    with pytest.raises(ValueError, match="11 keys do not fit") as error:
        locate(copy(cut)).tensors()
    assert str(error.value).count(f"missing: {last}") == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 20}, "^horizon: .*ours is no folder of LeRobot's or openpi's, and says that itself"),
        ({"vision_heads": 8, "horizon": 20}, "^vision_heads, horizon: "),
        ({"tokenizer": "tiny"}, r"ours has weights but no processor\.json, .*: convert what it came from"),
        ({"data": "some/data", "force": True}, "^data, force: of --format lerobot alone"),
    ],
)
def test_what_would_not_count_is_refused(copy: Copy, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save(tmp_path / "ours", locate(copy(lambda tensors: None)).model())
    with pytest.raises(ValueError, match=message):
        convert(source=tmp_path / "ours", target=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_key_with_and_without_its_prefix_is_listed(copy: Copy) -> None:
    with pytest.raises(ValueError, match=r"unexpected: .*time_mlp_in\.bias"):
        locate(copy(lambda tensors: tensors.update({"time_mlp_in.bias": torch.zeros(32)}))).tensors()


def test_a_misshaped_head_is_listed_though_nothing_reads_it(copy: Copy) -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is \[7, 32\], expected \[4096, 32\]"):
        locate(copy(lambda tensors: tensors.update({PREFIX + EXPERT_LM_HEAD: torch.zeros(7, 32)}))).tensors()


def test_a_missing_tensor_that_tells_a_dimension_is_listed(copy: Copy) -> None:
    key = "model.action_in_proj.weight"
    with pytest.raises(ValueError, match=key):
        locate(copy(lambda tensors: tensors.pop(key))).tensors()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_action_dim", 32, "max_action_dim is 32, but action_in_proj takes 5"),
        ("image_resolution", [224, 224], "there are 4 position embeddings"),
        ("image_resolution", [28, 56], "a square's"),
        ("type", "pi0", "type is 'pi0'"),
        ("min_period", 0.01, "min_period is 0.01"),
        ("action_expert_variant", "gemma_2b", "both gemma_2b"),
        ("output_features", {"action": {"type": "ACTION", "shape": [9]}}, "9 action dimensions"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(copy: Copy, name: str, value: object, message: str) -> None:
    folder = copy(lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(ValueError, match=message):
        locate(folder).tensors()


def test_a_truncated_checkpoint_leaves_no_target(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "truncated"
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        convert(source=folder, target=tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["truncated"]


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        convert(source=source, target=tmp_path)


def test_a_keypoint_backbone_has_no_place_in_lerobot() -> None:
    with pytest.raises(ValueError, match="siglip_gemma"):
        to_lerobot("backbone.vision.convs.0.weight")


@pytest.mark.parametrize("given", [["--force"], ["--force", "true"]])
def test_a_switch_may_stand_alone(given: list[str]) -> None:
    said: list[bool] = []

    def command(force: bool = False, name: str = "x") -> None:
        said.append(force)

    call(command, [*given, "--name", "y"], prog="pi05 command")
    assert said == [True]
