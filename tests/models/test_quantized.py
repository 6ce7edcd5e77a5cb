"""Layers of 4 and 8 bits: they are torchao's, adapters learn beside them, and nothing whole is left behind."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs, to_nf4
from torchao.quantization import Int8Tensor

from pi05_lightning.models.kernels import Linear
from pi05_lightning.models.parallelize import Lora, add_adapters, checkpoint_blocks, compile_blocks, quantize_base
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import (
    CLASSES,
    NF4_BLOCK,
    Int8Linear,
    Kind,
    NF4Linear,
    QuantizedLinear,
    quantizing,
    values_of,
)
from pi05_lightning.training.callbacks.throughput import Work
from pi05_lightning.types import Batch
from pi05_lightning.weights.adapters import merge
from pi05_lightning.weights.safetensors import build, fill

from .small import make_batch, small_config, small_model, token_nll

KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ERROR = {"nf4": 0.1, "int8": 0.01}
LORA = Lora(rank=2, alpha=4)


@KINDS
def test_a_packed_weight_counts_as_the_one_that_it_stands_for(kind: Kind) -> None:
    plain = Pi05.without_memory(small_config(depth=3))
    expected = Work.of(plain).parameters
    total = sum(parameter.numel() for parameter in plain.parameters())
    quantize_base(plain, kind, LORA)
    assert any(isinstance(layer, QuantizedLinear) for layer in plain.modules())
    assert sum(values_of(plain).values()) == total
    assert Work.of(plain).parameters == expected


def quantized_model(kind: Kind, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Pi05:
    """The small model with a quantised base, and adapters that do something."""
    plain = small_model(small_config(depth=3)).to(dtype)
    model = Pi05.without_memory(plain.config)
    model.to(dtype)
    quantize_base(model, kind, LORA)
    keep = quantizing(model)
    fill(model, {n: part for name, tensor in plain.state_dict().items() for n, part in keep(name, tensor).items()})
    add_adapters(model, LORA)
    freeze(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    if checkpointing:
        checkpoint_blocks(model)
    return model


def freeze(model: Pi05) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not re.search(LORA.frozen, name)


@pytest.fixture
def batch() -> Batch:
    return make_batch(small_config(depth=3), ["iippss", "iptt", "pff"], acting=2, draws=2)


def gradients(model: Pi05, batch: Batch) -> dict[str, Tensor]:
    terms = model(batch)
    torch.stack([term.values.mean() for term in terms.values()]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def torchaos(layer: QuantizedLinear) -> Tensor:
    """The weight that torchao makes of a layer's parts."""
    if isinstance(layer, Int8Linear):
        return Int8Tensor(layer.qdata, layer.scale, [1, layer.in_features], layer.scale.dtype).dequantize()
    assert isinstance(layer, NF4Linear)
    blocks = len(layer.quantized_scalers)
    shape = torch.Size((layer.out_features, layer.in_features))
    meta = SubclassTensorArgs(shape, (layer.in_features, 1), 0, layer.nf4.dtype, layer.nf4.device, False)
    sizes = NF4_BLOCK, blocks, blocks // len(layer.quantization_factor)
    scales = layer.quantized_scalers, layer.quantization_factor, layer.scaler_mean
    return NF4Tensor(meta, *sizes, *scales, layer.quantized_data, layer.nf4).get_original_weight()


@KINDS
@DTYPES
@pytest.mark.parametrize("shape", [(48, 32), (40, 24), (4304, 1152), (256, 512)])
def test_what_a_layer_computes_with_is_torchaos(kind: Kind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = Linear(shape[1], shape[0], dtype=dtype)
    layer = CLASSES[kind](plain)
    whole = torchaos(layer)
    assert torch.equal(layer.dequantized(dtype), whole)
    x = torch.randn(7, shape[1], dtype=dtype)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, whole, plain.bias))
    assert 0 < layer.error < ERROR[kind]
    assert sum(p.nbytes for p in layer.parameters()) < {"nf4": 0.7, "int8": 1.2}[kind] * plain.weight.numel() + 4000


@DTYPES
def test_nf4_values_are_torchaos(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 256, dtype=dtype)
    theirs = to_nf4(weight)
    ours = NF4Linear.quantize(weight)
    # torchao rounds in bf16, where a value between two levels may seem as near to either
    same = (ours["quantized_data"] == theirs.quantized_data).float().mean()
    assert same == 1 if dtype == torch.float32 else same > 0.999
    assert all(torch.equal(ours[name], getattr(theirs, name)) for name in NF4Linear.parts[1:])


@KINDS
def test_gradients_pass_a_layer_as_its_whole_weight_would_have_them(kind: Kind) -> None:
    layer = CLASSES[kind](Linear(32, 48))
    x, grad = torch.randn(3, 5, 32, requires_grad=True), torch.randn(3, 5, 48)
    layer(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ layer.dequantized(torch.float32))


@KINDS
@DTYPES
def test_weights_of_zeros_stay_zeros(kind: Kind, dtype: torch.dtype) -> None:
    layer = Linear(32, 48, dtype=dtype)
    nn.init.zeros_(layer.weight)
    quantized = CLASSES[kind](layer)
    assert not quantized.dequantized(dtype).any()
    assert quantized.error == 0


@KINDS
def test_all_frozen_linear_layers_are_quantised_and_no_others(kind: Kind) -> None:
    model = Pi05.without_memory(small_config())
    lora = Lora(targets="flow_head", train=(*Lora.train, "k_proj"))
    linear = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    quantize_base(model, kind, lora)
    found = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == {name for name in linear if "k_proj" not in name and "projector" not in name}
    assert any("backbone" in name for name in found)


@pytest.mark.slow_cases
@KINDS
@DTYPES
def test_adapters_learn_the_same_with_and_without_checkpointing(kind: Kind, dtype: torch.dtype, batch: Batch) -> None:
    plain, again = (gradients(quantized_model(kind, dtype, checkpointing), batch) for checkpointing in (False, True))
    assert {name for name in plain if ".lora_" in name}
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@KINDS
def test_adapters_learn_as_beside_the_weights_that_the_layers_stand_for(kind: Kind, batch: Batch) -> None:
    model = quantized_model(kind)
    whole = small_model(small_config(depth=3))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    with torch.no_grad():
        for name, layer in layers.items():
            whole.get_submodule(name.removesuffix(".base_layer")).weight.copy_(layer.dequantized(torch.float32))  # type: ignore[operator,union-attr]
    add_adapters(whole, LORA)
    whole.load_state_dict({n: p for n, p in model.state_dict().items() if ".lora_" in n}, strict=False)
    freeze(whole)
    expected = gradients(whole, batch)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow_cases
@KINDS
@torch.no_grad()
def test_merged_weights_compute_what_the_quantised_model_does(kind: Kind, batch: Batch) -> None:
    model = quantized_model(kind)
    merged = build(model.config, merge(model.config, LORA, model.state_dict(), kind))
    ours, theirs = model(batch), merged(batch)
    torch.testing.assert_close(token_nll(theirs), token_nll(ours))
    torch.testing.assert_close(theirs["flow"].values, ours["flow"].values)


@KINDS
def test_a_random_base_is_that_of_the_plain_model_quantised(kind: Kind) -> None:
    def begun(base: Kind | None) -> Pi05:
        torch.manual_seed(0)
        model = Pi05.without_memory(small_config())
        if base is not None:
            quantize_base(model, base, LORA)
        model.to_empty(device="cpu")
        model.reset_parameters()
        return model

    plain, quantized = begun(None), begun(kind)
    keep = quantizing(quantized)
    expected = {n: part for name, tensor in plain.state_dict().items() for n, part in keep(name, tensor).items()}
    found = quantized.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow  # the compiler takes a minute
@KINDS
def test_compiled_blocks_learn_the_same(kind: Kind, batch: Batch) -> None:
    eager, compiled = quantized_model(kind), quantized_model(kind)
    compile_blocks(compiled)
    checkpoint_blocks(compiled)
    expected = gradients(eager, batch)
    for name, gradient in gradients(compiled, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
