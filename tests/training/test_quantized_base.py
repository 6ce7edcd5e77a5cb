"""Runs whose adapters are trained beside a base of 4 or 8 bits: resumed exactly, validated, opened, converted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from pi05_lightning import Pi05Module
from pi05_lightning.cli.convert import convert
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import quantized_layers
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.weights.locate import locate
from tests.untrained import untrained_weights

LORA = Lora(rank=2)
CASES = pytest.mark.parametrize(("base", "precision"), [("nf4", "bf16-true"), ("int8", "32-true")])
Train = Callable[..., Trainer]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to begin with."""
    return untrained_weights(tmp_path_factory.mktemp("start"))


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.lightning_module.state_dict().items()}


@pytest.mark.slow
@CASES
def test_a_run_is_resumed_exactly_and_its_policy_is_the_trained_model(
    base: str, precision: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {"lora": LORA, "base": base, "activation_checkpointing": True}
    options = {"module_options": module, "precision": precision, "limit_val_batches": 1, "val_check_interval": 3}
    whole = train(WeightAverage(0.9), **options)
    expected = state(whole)
    again = train(WeightAverage(0.9), ckpt_path=tmp_path / "step=3.ckpt", **options)
    found = state(again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

    assert isinstance(again.lightning_module, Pi05Module)
    trained = again.lightning_module.model
    layers = quantized_layers(trained)
    assert len(layers) > 20
    merged = locate(tmp_path / "step=6.ckpt", averaged=False).tensors()
    name = "flow_head.layers.1.mlp.up_proj"
    adapters = trained.get_submodule(name)
    weight = layers[f"{name}.base_layer.weight"].dequantized(merged[f"{name}.weight"].dtype)
    delta = adapters.get_delta_weight("default")  # type: ignore[operator]
    assert delta.any()
    torch.testing.assert_close(merged[f"{name}.weight"], weight + delta.to(weight.dtype))

    convert(source=tmp_path / "step=6.ckpt", target=tmp_path / "whole")
    assert f"trained beside in {base}: {len(layers)} layers are dequantised" in capsys.readouterr().out
    assert locate(tmp_path / "whole").tensors().keys() == Pi05(ModelConfig.preset("debug")).state_dict().keys()


@pytest.mark.slow_cases
@CASES
def test_given_weights_are_quantised_as_they_are_read(
    base: str, precision: str, train: Train, start: Path, tmp_path: Path
) -> None:
    module = {"lora": LORA, "base": base, "init_from": str(start), "config": None}
    trained = train(module_options=module, precision=precision, max_steps=1).lightning_module.model
    tensors = locate(start).tensors(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    for name, layer in quantized_layers(trained).items():
        parts = layer.quantize(tensors.pop(name.replace(".base_layer", "")))
        assert all(torch.equal(getattr(layer, part), parts[part]) for part in layer.parts)
    found = trained.state_dict()
    whole = {name for name in tensors if not re.search(LORA.frozen, name)}
    for name in tensors.keys() - whole:
        own = found[name] if name in found else found[name.replace(".bias", ".base_layer.bias")]
        assert torch.equal(own, tensors[name])


def test_a_base_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.base nf4 .*--model\.lora\.rank 16"):
        Pi05Module(ModelConfig.preset("debug"), base="nf4")


def test_a_run_goes_on_with_the_base_that_it_was_begun_with(train: Train, tmp_path: Path) -> None:
    train(module_options={"lora": LORA, "base": "int8"}, max_steps=1)
    with pytest.raises(ValueError, match=r"model\.base is None, and int8 in the checkpoint"):
        train(module_options={"lora": LORA}, ckpt_path=tmp_path / "step=1.ckpt")


def test_a_quantised_base_is_not_sharded(train: Train) -> None:
    with pytest.raises(ValueError, match=r"model\.base nf4 is not sharded .*trainer\.strategy ddp"):
        train(module_options={"lora": LORA, "base": "nf4"}, strategy=ModelParallelStrategy(1, 1))
