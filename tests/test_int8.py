"""A policy that computes in 8 bits acts as the one that does not; which layers do is measured once and written down."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pi05_lightning import Pi05DataModule, Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.acting.frames import made_up_frames, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.acting.int8 import MAX_ACTION_ERROR, MAX_LAYER_ERROR, choose
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.int8 import UNEMBEDDING, Int8Product, linear_layers
from pi05_lightning.models.kernels import Linear
from pi05_lightning.weights.int8 import Choice
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.safetensors import WEIGHTS, save_tensors
from tests.random_fast import random_fast
from tests.untrained import seeing, untrained_model, untrained_policy

LAYER = "flow_head.layers.0.mlp.down_proj"


@pytest.fixture
def folder(videos: Path, tmp_path: Path) -> Path:
    return untrained_policy(tmp_path / "policy", videos, "tiny", speaks=False)


def speaking(videos: Path, folder: Path, acting: Acting) -> Inference:
    """An untrained policy of the size `debug`, which says subtasks and acts with both heads."""
    config = ModelConfig.preset("debug")
    random_fast(config, scale=3).save(folder)
    data = Pi05DataModule({"robot": LeRobotConfig(str(videos))}, fast=folder, shapes=config.shapes)
    return Inference(seeing(untrained_model(seed=1)), data.processor, acting)


def choice_of(folder: Path) -> Path:
    """Where the choice is that was made for a folder of weights."""
    return folder.with_name("policy.int8.json")


def choices_of(folder: Path) -> list[dict]:
    return json.loads(choice_of(folder).read_text())["choices"]


def chunks_of(policy: Pi05Policy) -> np.ndarray:
    """Of frames that the choice was not made on among others, as shares of the actions' ranges."""
    config = policy.model.config
    noise = torch.randn(1, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(1))
    frames = [*recorded_frames(policy, None, 5), *made_up_frames(policy)]
    chunks = [policy.predict_chunks([frame], [None], noise)[0] for frame in frames]
    return np.stack(chunks) / policy.processor.robots[policy.robot].normalize.action.span


def int8_layers(policy: Pi05Policy) -> set[str]:
    return {name for name, layer in policy.model.named_modules() if isinstance(layer, Int8Product)}


def test_a_layer_is_its_rounded_weight_and_a_token_of_large_values_costs_the_others_nothing() -> None:
    torch.manual_seed(0)
    layer = Linear(256, 128)
    x = torch.randn(2, 5, 256)
    x[0, 0] *= 1000
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    by_hand = (layer.weight / scale).round().clamp(-128, 127) * scale
    with torch.no_grad():
        found, expected = Int8Product(layer.weight, layer.bias)(x), x @ by_hand.T + layer.bias
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.min() > 0.002
    assert errors.max() < 0.03


@pytest.mark.parametrize("kind", ["of both signs", "positive", "far from zero"])
def test_a_row_comes_to_the_same_whoever_else_is_there(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = Int8Product(Linear(256, 128).weight), torch.randn(40, 256)
    x = {"of both signs": x, "positive": x.relu(), "far from zero": x + 20}[kind]
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=0)
    torch.testing.assert_close(layer(torch.cat([x, -9 * x]))[:40], alone, rtol=0, atol=0)


def test_a_row_of_one_sign_has_all_steps_for_its_values_beside_rows_of_the_other() -> None:
    torch.manual_seed(0)
    layer = Linear(256, 128, bias=False)
    rows = torch.rand(50, 256) ** 2
    rows = torch.cat([rows, -rows])
    with torch.no_grad():
        expected = layer(rows)
        assert (Int8Product(layer.weight)(rows) - expected).norm() / expected.norm() < 0.015
        assert torch.equal(Int8Product(layer.weight)(torch.zeros(2, 256)), torch.zeros(2, 128))


def test_bf16_goes_in_and_comes_out() -> None:
    layer = Int8Product(Linear(64, 32).bfloat16().weight)
    assert layer(torch.randn(3, 64).bfloat16()).dtype == layer.weight.dtype == torch.bfloat16


def test_a_large_weight_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 50), torch.randn(2, 3, 64)
    whole = Int8Product(layer.weight, layer.bias)(x)
    monkeypatch.setattr("pi05_lightning.models.int8.PACKED", 16 * 64)
    torch.testing.assert_close(Int8Product(layer.weight, layer.bias)(x), whole, rtol=0, atol=0)


def test_an_int8_policy_acts_as_the_plain_one(folder: Path) -> None:
    before = {file.name for file in folder.iterdir()}
    plain, policy = Pi05Policy(folder), Pi05Policy(folder, dtype="int8")
    (choice,) = choices_of(folder)
    assert choice["action_error"] <= MAX_ACTION_ERROR
    assert int8_layers(policy) == {*linear_layers(plain.model), UNEMBEDDING} - {*choice["kept"]}
    assert len(int8_layers(policy)) > len(choice["errors"]) / 2
    assert {file.name for file in folder.iterdir()} == before  # whose hash says which policy it is
    error = np.abs(chunks_of(policy) - chunks_of(plain)).max()
    assert 0 < error <= 2 * MAX_ACTION_ERROR


@pytest.mark.slow
def test_the_choice_is_read_again_and_done_as_it_says(folder: Path) -> None:
    first = chunks_of(Pi05Policy(folder, dtype="int8"))
    file = choice_of(folder)
    before = file.stat().st_mtime_ns
    np.testing.assert_array_equal(chunks_of(Pi05Policy(folder, dtype="int8")), first)
    assert file.stat().st_mtime_ns == before
    (choice,) = choices_of(folder)
    file.write_text(json.dumps({"choices": [choice | {"kept": [*choice["kept"], LAYER]}]}))
    policy = Pi05Policy(folder, dtype="int8")
    assert int8_layers(policy) == choice["errors"].keys() - {*choice["kept"], LAYER}
    assert isinstance(policy.model.get_submodule(LAYER), Linear)


def test_a_layer_that_eight_bits_do_not_fit_stays_as_it_is(videos: Path, folder: Path) -> None:
    plain = Pi05Policy(folder)
    with torch.no_grad():  # one column beside which all others round to nothing, and which cancels in the product
        layer = plain.model.get_submodule(LAYER)
        layer.weight[:, :2] = torch.tensor([1e5, -1e5])
        mlp = plain.model.get_submodule(LAYER.rpartition(".")[0])
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[1] = projection.weight[0]
    plain.save_pretrained(folder)
    policy = Pi05Policy(folder, dtype="int8")
    assert LAYER not in int8_layers(policy)
    assert len(int8_layers(policy)) > 0


def test_what_it_says_stays_the_same(videos: Path, tmp_path: Path) -> None:
    policy = speaking(videos, tmp_path, Acting())
    frames = made_up_frames(policy)
    subtasks = policy.predict_subtasks(frames)
    choice = choose(policy, frames)
    assert choice.way == ("robot", "flow", True)
    assert policy.predict_subtasks(frames) == subtasks


def test_actions_of_fast_tokens_stay_the_same(videos: Path, tmp_path: Path) -> None:
    policy = speaking(videos, tmp_path, Acting(actions="fast", hierarchical=False))
    frames = recorded_frames(policy, None, 6)
    chunks = [policy.predict_chunks([frame], [None]) for frame in frames]
    choice = choose(policy, frames)
    assert choice.way == ("robot", "fast", False)
    for frame, chunk in zip(frames, chunks, strict=True):
        np.testing.assert_array_equal(policy.predict_chunks([frame], [None]), chunk)


def test_a_layer_that_did_not_run_stays_as_it_is(videos: Path, tmp_path: Path) -> None:
    policy = speaking(videos, tmp_path, Acting(actions="fast"))
    choice = choose(policy, made_up_frames(policy))
    flow = {name for name in linear_layers(policy.model) if name.startswith("flow_head")}
    assert len(flow) > 0
    assert flow <= {*choice.kept}


def test_logits_of_what_is_said_are_made_in_8_bits_and_tokens_looked_up_as_before(videos: Path, tmp_path: Path) -> None:
    policy = speaking(videos, tmp_path, Acting(actions="fast", hierarchical=False))
    backbone = policy.model.backbone
    embedding, hidden = backbone.embed_tokens.weight.clone(), torch.randn(3, backbone.embed_tokens.embedding_dim)
    expected = backbone.logits(hidden)
    choice = choose(policy, recorded_frames(policy, None, 1))
    assert 0 < choice.errors[UNEMBEDDING] <= MAX_LAYER_ERROR
    assert UNEMBEDDING not in choice.kept
    assert isinstance(backbone.unembedding, Int8Product)
    assert 0 < (backbone.logits(hidden) - expected).norm() / expected.norm() < 0.03
    assert torch.equal(backbone.embed_tokens.weight, embedding)


def test_a_policy_that_says_nothing_has_no_8_bit_logits(videos: Path, tmp_path: Path) -> None:
    policy = speaking(videos, tmp_path, Acting(hierarchical=False))
    assert UNEMBEDDING in choose(policy, made_up_frames(policy)).kept
    assert policy.model.backbone.unembedding is None


def test_without_frames_nothing_is_chosen(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames to compare"):
        choose(speaking(videos, tmp_path, Acting()), [])


def test_a_choice_of_other_weights_is_made_anew(videos: Path, folder: Path) -> None:
    Pi05Policy(folder, dtype="int8")
    (first,) = choices_of(folder)
    untrained_policy(folder, videos, "tiny", seed=1, speaks=False)
    Pi05Policy(folder, dtype="int8")
    (second,) = choices_of(folder)
    assert second["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize("constant", ["ROUNDING", "MEASURE"])
def test_a_choice_that_was_measured_otherwise_is_made_anew(
    constant: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(f"pi05_lightning.weights.int8.{constant}", 1)
        Pi05Policy(folder, dtype="int8")
    (first,) = choices_of(folder)
    Pi05Policy(folder, dtype="int8")
    (second,) = choices_of(folder)
    assert second["fingerprint"] != first["fingerprint"]


def test_each_way_of_acting_has_a_choice_of_its_own(folder: Path) -> None:
    speaking = Pi05Policy(folder, dtype="int8")
    (first,) = choices_of(folder)
    silent = Pi05Policy(folder, dtype="int8", hierarchical=False)
    both = choices_of(folder)
    assert both[0] == first
    assert [choice["way"] for choice in both] == [["robot", "flow", True], ["robot", "flow", False]]
    for policy, choice in zip((speaking, silent), both, strict=True):
        assert int8_layers(policy) == choice["errors"].keys() - {*choice["kept"]}


def test_a_choice_of_the_working_folder_is_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert Choice.file(locate(Path())) == choice_of(folder)


def test_a_damaged_choice_is_refused(folder: Path) -> None:
    choice_of(folder).write_text('{"choices": [{}]}')
    with pytest.raises(ValueError, match=r"int8\.json does not say which layers .* delete it"):
        Pi05Policy(folder, dtype="int8")


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    Pi05Policy(folder, dtype="int8")
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:-1].clone()
    del tensors["backbone.layers.0.mlp.up_proj.weight"]
    save_tensors(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"(?s)2 keys .* missing: \S+up_proj\.weight .* misshaped: \S+down_proj"):
        Pi05Policy(folder, dtype="int8")


def test_an_unknown_dtype_and_another_device_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype int4: .* use `pi05 export --dtype int4`"):
        Pi05Policy(folder, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype is torch\.int8: .* give 'int8'"):
        Pi05Policy(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype int8 computes on a CPU alone, and device is meta"):
        Pi05Policy(folder, dtype="int8", device="meta")


def test_a_machine_without_the_engine_is_refused(folder: Path) -> None:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    try:
        with pytest.raises(ValueError, match="no 8-bit products for this machine"):
            Pi05Policy(folder, dtype="int8")
    finally:
        torch.backends.quantized.engine = engine


def test_an_int8_policy_is_neither_saved_nor_moved(folder: Path, tmp_path: Path) -> None:
    policy = Pi05Policy(folder, dtype="int8")
    with pytest.raises(ValueError, match="cannot be saved: load it without dtype"):
        policy.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="cannot be moved to cuda"):
        policy.to_device("cuda")
