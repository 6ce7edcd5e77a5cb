"""openpi's JAX parameters: each does in our model what it does in openpi's, and folders that Orbax wrote are opened.

Orbax is in no lock. Where it is not installed, the slow tests install it beside the environment, for themselves.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pi05_lightning import Pi05Module, Pi05Policy
from pi05_lightning.cli.convert import convert
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.orbax import flat, is_orbax, ours
from pi05_lightning.weights.safetensors import shapes_of

from .openpi_tree import ACTIONS, EXPERT_WIDTH, HEAD_DIM, HEADS, PATCH, VISION_HEADS, VISION_WIDTH, tree, with_values

ROOT = Path(__file__).parents[2]


def converted(parameters: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """openpi's, flat, and ours."""
    theirs = {name: torch.from_numpy(array) for name, array in flat(parameters).items()}
    return theirs, ours(theirs, "a tree")[0]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("end", "tower", "width"), [("", "backbone", 10), ("_1", "flow_head", EXPERT_WIDTH)])
@pytest.mark.parametrize("lora", [False, True])
def test_gemmas_projections_are_openpis_einsums(end: str, tower: str, width: int, lora: bool) -> None:
    theirs, own = converted(tree(lora=lora))
    for layer in range(2):

        def w(name: str, part: str, layer: int = layer) -> Tensor:
            return theirs[f"PaliGemma/llm/layers/{name}{part}"][layer]

        def linear(name: str, of: Tensor, layer: int = layer) -> Tensor:
            return of @ own[f"{tower}.layers.{layer}.{name}.weight"].T

        q, kv, out = (f"attn/{name}_einsum{end}" for name in ("q", "kv", "attn_vec"))
        hidden, heads = x(4, width), x(4, HEADS, HEAD_DIM)
        query = torch.einsum("td,ndh->tnh", hidden, w(q, "/w"))
        both = torch.einsum("sd,ckdh->cskh", hidden, w(kv, "/w"))
        result = torch.einsum("tnh,nhd->td", heads, w(out, "/w"))
        up = torch.einsum("td,cdf->ctf", hidden, w(f"mlp{end}/gating_einsum", ""))
        wide = x(4, up.shape[-1])
        down = wide @ w(f"mlp{end}/linear", "")
        if lora:  # with the labels that openpi's `_make_lora_eqns` makes
            first = torch.einsum("td,ndl->tnl", hidden, w(q, "/lora_a"))
            query += torch.einsum("tnl,nlh->tnh", first, w(q, "/lora_b"))
            first = torch.einsum("sd,ckdl->cskl", hidden, w(kv, "/lora_a"))
            both += torch.einsum("cskl,cklh->cskh", first, w(kv, "/lora_b"))
            first = torch.einsum("tnh,nhl->tl", heads, w(out, "/lora_a"))
            result += torch.einsum("tl,nld->td", first, w(out, "/lora_b"))
            gate = f"mlp{end}/gating_einsum_lora_"
            up += torch.stack([hidden @ w(gate, "a")[c] @ w(gate, "b")[c] for c in range(2)])
            down += wide @ w(f"mlp{end}/linear_lora_", "a") @ w(f"mlp{end}/linear_lora_", "b")
        same(linear("self_attn.q_proj", hidden), query.flatten(1))
        same(linear("self_attn.k_proj", hidden), both[0].flatten(1))
        same(linear("self_attn.v_proj", hidden), both[1].flatten(1))
        same(linear("self_attn.o_proj", heads.flatten(1)), result)
        same(linear("mlp.gate_proj", hidden), up[0])
        same(linear("mlp.up_proj", hidden), up[1])
        same(linear("mlp.down_proj", wide), down)


def test_siglips_layers_are_openpis() -> None:
    theirs, own = converted(tree())
    block, hidden = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0", x(4, VISION_WIDTH)
    heads = hidden.unflatten(1, (VISION_HEADS, -1))
    for layer in range(3):
        ours_here = f"backbone.vision.layers.{layer}.self_attn"
        for name in ("query", "key", "value"):
            expected = torch.einsum("td,dhk->thk", hidden, theirs[f"{block}/{name}/kernel"][layer])
            expected += theirs[f"{block}/{name}/bias"][layer]
            weight, bias = (own[f"{ours_here}.{name[0]}_proj.{part}"] for part in ("weight", "bias"))
            same(hidden @ weight.T + bias, expected.flatten(1))
        expected = torch.einsum("thk,hkd->td", heads, theirs[f"{block}/out/kernel"][layer])
        same(hidden @ own[f"{ours_here}.out_proj.weight"].T, expected)
    image = x(1, PATCH, PATCH, 3)  # openpi's images have their channels last
    expected = torch.einsum("bijc,ijcd->bd", image, theirs["PaliGemma/img/embedding/kernel"])
    found = torch.nn.functional.conv2d(image.permute(0, 3, 1, 2), own["backbone.vision.patch_embedding.weight"])
    same(found.flatten(1), expected)


def on_meta(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to("meta") for name, array in flat(parameters).items()}


@pytest.mark.filterwarnings("ignore:Tensor.mT is deprecated")
@pytest.mark.parametrize("lora", [False, True])
def test_a_parameter_of_other_axes_is_named_or_makes_a_tensor_of_another_shape(lora: bool) -> None:
    theirs = on_meta(tree(lora=lora))
    expected = shapes_of(ours(theirs, "here")[0])
    for name, whole in theirs.items():
        for odd in (whole[None], whole[0], whole.flatten()[0]):
            try:
                found = shapes_of(ours(theirs | {name: odd}, "here")[0])
            except ValueError as error:
                assert f"misshaped: {name} {list(odd.shape)}" in str(error)  # noqa: PT017 - not all are found here
            else:
                assert found != expected or name == "PaliGemma/img/pos_embedding", name  # its axes are merged


def test_parameters_of_other_axes_are_listed_with_what_is_missing() -> None:
    theirs = on_meta(tree())
    names = ("PaliGemma/img/embedding/kernel", "PaliGemma/llm/layers/attn/q_einsum/w")
    broken = theirs | {name: theirs[name][..., 0] for name in names}
    del broken["time_mlp_in/bias"]
    with pytest.raises(ValueError, match=r"here is no π0\.5 of openpi's: 3 of its parameters do not fit") as error:
        ours(broken, "here")
    assert "missing: time_mlp_in/bias" in str(error.value)
    assert all(f"misshaped: {name} {list(broken[name].shape)}" in str(error.value) for name in names)


def test_missing_and_foreign_parameters_are_all_listed() -> None:
    parameters = tree()
    del parameters["time_mlp_in"]
    parameters["PaliGemma"]["llm"]["layers"]["mlp"].pop("linear")
    parameters["state_proj"] = {"kernel": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match="4 of its parameters do not fit") as error:
        converted(parameters)
    for said in ("time_mlp_in/kernel", "time_mlp_in/bias", "llm/layers/mlp/linear", "unexpected: state_proj/kernel"):
        assert said in str(error.value)


def test_half_of_a_lora_is_refused() -> None:
    parameters = tree(lora=True)
    attention = parameters["PaliGemma"]["llm"]["layers"]["attn"]
    del attention["q_einsum"]["lora_b"], attention["kv_einsum"]["lora_a"]
    with pytest.raises(ValueError, match="of some a part is missing") as error:
        converted(parameters)
    for said in ("q_einsum/lora_b", "kv_einsum/lora_a"):
        assert said in str(error.value)


def test_folder_that_lost_its_metadata_is_still_known(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    assert not is_orbax(tmp_path)
    (tmp_path / "params" / "manifest.ocdbt").touch()
    assert is_orbax(tmp_path)
    (tmp_path / "params" / "manifest.ocdbt").unlink()
    (tmp_path / "assets").mkdir()
    assert is_orbax(tmp_path)


def test_without_orbax_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, "orbax", None)
    assert is_orbax(tmp_path)
    with pytest.raises(ValueError, match="pip install orbax-checkpoint"):
        locate(tmp_path)


# --- folders


@pytest.fixture(scope="session")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Orbax itself."""
    if importlib.util.find_spec("orbax") is None:
        folder = tmp_path_factory.mktemp("orbax")
        command = [
            "-m",
            "uv",
            "pip",
            "install",
            "--target",
            folder,
            "orbax-checkpoint",
            "-c",
            ROOT / "requirements.lock",
        ]
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
        sys.path.append(str(folder))  # last: what is installed already is taken from the environment
        importlib.invalidate_caches()
    import orbax.checkpoint

    return orbax.checkpoint


Write = Callable[..., Path]


@pytest.fixture
def write(orbax: Any, tmp_path: Path) -> Write:
    """Writes a checkpoint as openpi's training does: with `value`, statistics, and its state if there is one."""

    def written(parameters: dict[str, Any], state: dict[str, Any] | None = None, values: bool = True) -> Path:
        folder = tmp_path / "1000"
        with orbax.PyTreeCheckpointer() as checkpointer:
            content = with_values(parameters) if values else parameters
            checkpointer.save(folder / "params", {"params": content})
            if state is not None:
                training = {"params": with_values(state), "step": np.array(1000), "opt_state": {"mu": np.zeros(3)}}
                checkpointer.save(folder / "train_state", training)
        stats = {name: {"q01": [-1.0] * n, "q99": [2.0] * n} for name, n in (("state", 4), ("actions", ACTIONS))}
        (folder / "assets" / "lab").mkdir(parents=True)
        (folder / "assets" / "lab" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
        return folder

    return written


def equal(found: dict[str, Tensor], parameters: dict[str, Any]) -> bool:
    _, expected = converted(parameters)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_folder_is_opened_with_every_parameter(write: Write, values: bool, lora: bool) -> None:
    folder = write(tree(lora=lora), values=values)
    weights = locate(folder)
    assert weights.config().vision.num_heads == VISION_HEADS
    assert equal(weights.tensors(), tree(lora=lora))
    assert equal(locate(folder / "params").tensors(), tree(lora=lora))


@pytest.mark.slow
def test_average_or_what_is_trained_on_by_choice(write: Write) -> None:
    folder = write(tree(seed=1), state=tree(seed=2))
    assert equal(locate(folder).tensors(), tree(seed=1))
    other = locate(folder, averaged=False)
    assert equal(other.tensors(), tree(seed=2))
    assert not [note for note in other.notes if "train_state" in note]
    shutil.rmtree(folder / "train_state")
    assert [note for note in locate(folder, averaged=False).notes if "train_state is not there" in note]


@pytest.mark.slow
def test_without_an_average_both_are_the_same(write: Write) -> None:
    folder = write(tree(), state={})
    assert equal(locate(folder, averaged=False).tensors(), tree())


@pytest.mark.slow
def test_bf16_stays_bf16(write: Write, orbax: Any) -> None:
    import ml_dtypes

    parameters = tree()
    parameters["time_mlp_in"]["bias"] = parameters["time_mlp_in"]["bias"].astype(ml_dtypes.bfloat16)
    found = locate(write(parameters)).tensors()["flow_head.time_mlp_in.bias"]
    assert found.dtype == torch.bfloat16
    same(found.float(), torch.from_numpy(parameters["time_mlp_in"]["bias"].astype(np.float32)))


@pytest.mark.slow
def test_policy_training_and_conversion_begin_with_it(write: Write, tmp_path: Path) -> None:
    folder = write(tree())
    convert(source=folder, target=tmp_path / "ours", tokenizer="tiny")
    convert(source=folder, target=tmp_path / "short", tokenizer="tiny", horizon=15)
    assert locate(tmp_path / "short").config().horizon == 15
    policies = [Pi05Policy.from_pretrained(folder, tokenizer="tiny"), Pi05Policy.from_pretrained(tmp_path / "ours")]
    images = {camera: torch.zeros(3, 9, 9) for camera in policies[0].inputs.cameras}
    observation = {"image": images, "state": torch.zeros(4), "task": "open"}
    noise = torch.zeros(policies[0].model.config.horizon, ACTIONS)
    one, other = (policy.predict_chunk(observation, noise) for policy in policies)
    assert one.shape == (50, ACTIONS)
    assert (one == other).all()
    module = Pi05Module(init_from=str(folder))
    module.configure_model()
    same(module.model.flow_head.time_mlp_in.bias, torch.from_numpy(tree()["time_mlp_in"]["bias"]))


@pytest.mark.slow
def test_truncated_and_foreign_folders_say_what_is_missing(write: Write, orbax: Any, tmp_path: Path) -> None:
    folder = write(tree())
    data = sorted((folder / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    data[-1].write_bytes(data[-1].read_bytes()[: data[-1].stat().st_size // 2])
    with pytest.raises(ValueError, match="params is damaged") as error:
        locate(folder).tensors()
    assert "input_embedding" in str(error.value)
    for file in data:
        file.unlink()
    with pytest.raises(ValueError, match="cannot be read by Orbax"):
        locate(folder)
    (folder / "params" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="cannot be read by Orbax"):
        locate(folder)
    (folder / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="cannot be read by Orbax"):
        locate(folder)
    shutil.rmtree(folder)
    parameters = tree()
    del parameters["action_in_proj"]
    with pytest.raises(ValueError, match="missing: action_in_proj/kernel"):
        locate(write(parameters)).config()
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other" / "params", {"weights": np.zeros(3)})
    with pytest.raises(ValueError, match="has no params, but weights"):
        locate(tmp_path / "other")
