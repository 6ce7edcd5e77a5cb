"""Weights on disk: what is wrong is said in full, what is right is taken over without a copy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pi05_lightning.files.local import read_json
from pi05_lightning.models.config import GemmaConfig, VisionConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.folder import ExportedFolder, save
from pi05_lightning.weights.lerobot import lerobot_tensors
from pi05_lightning.weights.safetensors import (
    build,
    map_tensors,
    read_tensors,
    save_tensors,
)
from tests.models.small import make_batch, small_config, small_model, token_nll


@pytest.fixture
def model() -> Pi05:
    return small_model()


@pytest.fixture
def file(model: Pi05, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_tensors(model.state_dict(), path)
    return path


def test_a_saved_file_has_the_mode_of_any_new_file(file: Path) -> None:
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_saved_and_built_again_computes_the_same(model: Pi05, file: Path) -> None:
    again = build(model.config, read_tensors(file))
    batch = make_batch(model.config, ["iipps", "ptt"], acting=1)
    assert torch.equal(again(batch)["flow"].values, model(batch)["flow"].values)
    assert torch.equal(token_nll(again(batch)), token_nll(model(batch)))


def test_a_built_model_has_nothing_left_on_meta_and_trains(model: Pi05, file: Path) -> None:
    again = build(model.config, read_tensors(file))
    assert {tensor.device.type for tensor in (*again.parameters(), *again.buffers())} == {"cpu"}
    assert all(parameter.requires_grad for parameter in again.parameters())
    before = again.backbone.norm.weight.detach().clone()
    out = again(make_batch(model.config, ["iipps"], acting=1))
    (token_nll(out).mean() + out["flow"].values.mean()).backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert not torch.equal(again.backbone.norm.weight, before)


def test_tensors_are_taken_over_without_a_copy(model: Pi05, file: Path) -> None:
    tensors = read_tensors(file)
    again = build(model.config, tensors)
    assert all(parameter.data_ptr() == tensors[name].data_ptr() for name, parameter in again.named_parameters())


def test_dtype_is_converted_on_the_way(model: Pi05, file: Path) -> None:
    tensors = read_tensors(file, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, model.state_dict()[key].bfloat16()) for key, tensor in tensors.items())


def test_only_the_keys_asked_for_are_read(file: Path) -> None:
    assert list(read_tensors(file, ["backbone.norm.weight"])) == ["backbone.norm.weight"]


@pytest.mark.parametrize("read", [read_tensors, map_tensors])
def test_what_was_saved_is_read_bit_by_bit(read: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(3, 5).bfloat16(),
        "whole": torch.arange(7),
        "transposed": torch.randn(4, 6).T,
    }
    save_tensors(tensors, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def test_a_loaded_model_outlives_its_file(model: Pi05, file: Path) -> None:
    again = build(model.config, read_tensors(file))
    file.write_bytes(b"")
    assert torch.equal(again.backbone.embed_tokens.weight, model.backbone.embed_tokens.weight)


def test_every_key_that_does_not_fit_is_listed(model: Pi05) -> None:
    tensors = dict(model.state_dict())
    del tensors["backbone.norm.weight"]
    del tensors["flow_head.time_mlp_in.bias"]
    tensors["backbone.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 3)
    tensors["flow_head.action_in_proj.weight"] = torch.zeros(9, 4)
    with pytest.raises(ValueError, match="4 keys do not fit") as error:
        build(model.config, tensors)
    for expected in (
        "missing: backbone.norm.weight [32]",
        "missing: flow_head.time_mlp_in.bias [24]",
        "unexpected: backbone.layers.7.mlp.up_proj.weight [2, 3]",
        "misshaped: flow_head.action_in_proj.weight is [9, 4], expected [24, 4]",
    ):
        assert expected in str(error.value)


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        read_json(tmp_path / "config.json")


def test_a_config_with_unknown_dimensions_is_refused(file: Path) -> None:
    (file.parent / "config.json").write_text('{"horizon": 3, "wings": 2}')
    with pytest.raises(ValueError, match="wings"):
        ExportedFolder(file.parent).model()


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_refused_by_name(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_tensors(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        read_tensors(tmp_path / "nowhere.safetensors")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no safetensors file"):
        read_tensors(path)


def test_damaged_json_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"horizon": 5,\n oops}')
    with pytest.raises(ValueError, match=r"config\.json .*line 2"):
        read_json(tmp_path / "config.json")


def test_replacing_a_file_does_not_disturb_the_model_that_maps_it(model: Pi05, file: Path) -> None:
    mapped = build(model.config, map_tensors(file))
    save_tensors({"other": torch.zeros(1)}, file)
    assert torch.equal(mapped.backbone.embed_tokens.weight, model.backbone.embed_tokens.weight)


def test_an_interrupted_save_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def interrupted(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("pi05_lightning.weights.safetensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": torch.zeros(1)}, file)
    assert file.read_bytes() == before


MEASURE = """
import resource, sys
import torch
from pi05_lightning.weights.locate import locate

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
model = locate(sys.argv[1]).model()
touched = sum(parameter.sum() for parameter in model.parameters())
# a second of imports, which torch does when it is asked for random numbers on the meta device
assert "torch._dynamo" not in sys.modules
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["ours", "lerobot"])
def test_loading_takes_no_more_memory_than_the_file(format: str, tmp_path: Path) -> None:
    config = small_config(
        vision=VisionConfig(image_size=14, patch_size=14, width=72, depth=1, mlp_dim=32, num_heads=1),
        language=GemmaConfig(128, 2, 1024, 4, 1, 8),
        expert=GemmaConfig(24, 2, 40, 4, 1, 8),
        vocab_size=160_000,
    )
    model = Pi05(config)
    if format == "ours":
        save(tmp_path, model)
    else:
        save_tensors(lerobot_tensors(model.state_dict(), {}), tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 80e6
    assert int(done.stdout) < 1.15 * size
