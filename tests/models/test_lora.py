"""Adapters: where they are, that they begin as nothing, what is trained, and that merging keeps the function."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from pi05_lightning.models.parallelize import Lora, add_adapters
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch
from pi05_lightning.weights.adapters import merge
from pi05_lightning.weights.safetensors import build

from .small import make_batch, small_config, small_model, token_nll

WHOLE = ("time_mlp_in", "time_mlp_out", "action_in_proj", "action_out_proj", "projector")


@pytest.fixture
def model() -> Pi05:
    return small_model(small_config(depth=3))


@pytest.fixture
def batch(model: Pi05) -> Batch:
    return make_batch(model.config, ["iippss", "iptt", "pff"], acting=2, draws=2)


@torch.no_grad()
def outputs(model: Pi05, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(batch)
    return token_nll(out), out["flow"].values


def trained_adapters(model: Pi05, dropout: float = 0.0) -> Pi05:
    add_adapters(model, Lora(rank=2, alpha=4, dropout=dropout))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_every_linear_layer_has_an_adapter_unless_it_is_trained_whole(model: Pi05) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    add_adapters(model, Lora(rank=2))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {name for name in linear if name.rpartition(".")[2] not in WHOLE}


def test_adapters_and_projections_are_trained_and_nothing_else(model: Pi05) -> None:
    add_adapters(model, Lora(rank=2))
    trained = {name for name, _ in model.named_parameters() if not re.search(Lora().frozen, name)}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n or n.split(".")[-2] in WHOLE}


def test_new_adapters_change_nothing(model: Pi05, batch: Batch) -> None:
    before = outputs(model, batch)
    add_adapters(model, Lora(rank=2))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), before, strict=True))


def test_merged_model_computes_what_the_adapters_did(model: Pi05, batch: Batch) -> None:
    plain, names = outputs(model, batch), list(model.state_dict())
    tensors = trained_adapters(model).state_dict()
    adapted = outputs(model, batch)
    merged = merge(model.config, Lora(rank=2, alpha=4), {name: x.clone() for name, x in tensors.items()})
    assert list(merged) == names
    torch.testing.assert_close(outputs(build(model.config, merged), batch), adapted)
    assert not torch.allclose(plain[0], adapted[0], atol=1e-2)


def test_missing_adapter_is_named(model: Pi05) -> None:
    tensors = trained_adapters(model).state_dict()
    lost = tensors.popitem()[0]
    with pytest.raises(ValueError, match=re.escape(f"missing: {lost}")):
        merge(model.config, Lora(rank=2, alpha=4), tensors)


def test_targets_choose_the_layers(model: Pi05) -> None:
    add_adapters(model, Lora(rank=2, targets=r"flow_head\..*(q|v)_proj$"))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {f"flow_head.layers.{i}.self_attn.{kind}_proj" for i in range(3) for kind in "qv"}


def test_targets_without_a_layer_are_refused(model: Pi05) -> None:
    with pytest.raises(ValueError, match=r"lora\.targets 'decoder' matches no linear layer"):
        add_adapters(model, Lora(targets="decoder"))


def test_rank_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.rank is 0"):
        Lora(rank=0)


def test_adapters_drop_out_in_training_alone(model: Pi05, batch: Batch) -> None:
    trained_adapters(model, dropout=0.5)
    assert torch.equal(outputs(model.eval(), batch)[0], outputs(model, batch)[0])
    assert not torch.equal(outputs(model.train(), batch)[0], outputs(model, batch)[0])
