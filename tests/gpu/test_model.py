"""The model on CUDA: precisions, activation checkpointing, the compiler and captured graphs agree with it in fp32."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from pi05_lightning.models.capture import CapturedChunk
from pi05_lightning.models.kernels import Linear
from pi05_lightning.models.parallelize import checkpoint_blocks, compile_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import CLASSES, Kind
from pi05_lightning.types import Batch
from tests.models.small import make_batch, small_config, small_model, token_nll

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

CONFIG = small_config(depth=3)


def everything() -> Batch:
    """Every kind of target, rows of different lengths, two noise draws."""
    return make_batch(CONFIG, ["iippss", "iptt", "pff"], acting=2, draws=2)


def prompts(*rows: str, seed: int = 0) -> Batch:
    """What a robot asks, on the device."""
    return make_batch(CONFIG, rows, seed=seed).to("cuda")


def step(model: Pi05, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(batch)
    loss = token_nll(out).mean() + out["flow"].values.mean()
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_on_cuda_are_the_cpus() -> None:
    loss, gradients = step(small_model(CONFIG), everything())
    on_cuda, cuda_gradients = step(small_model(CONFIG).cuda(), everything().to("cuda"))
    torch.testing.assert_close(on_cuda, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cuda_gradients, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixed", [True, False])
def test_bf16_on_cuda_agrees_with_fp32(mixed: bool) -> None:
    exact, _ = step(small_model(CONFIG).cuda(), everything().to("cuda"))
    model = small_model(CONFIG).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        found, gradients = step(model if mixed else model.bfloat16(), everything().to("cuda"))
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32 if mixed else torch.bfloat16}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_on_cuda_give_the_same_loss_and_gradients(checkpointing: bool) -> None:
    torch._dynamo.reset()
    plain, compiled = small_model(CONFIG).cuda(), small_model(CONFIG).cuda()
    compile_blocks(compiled)
    if checkpointing:
        checkpoint_blocks(compiled)
    loss, gradients = step(plain, everything().to("cuda"))
    other_loss, other_gradients = step(compiled, everything().to("cuda"))
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-3, atol=1e-4)


def noise_of(batch: Batch, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = len(batch), CONFIG.horizon, CONFIG.action_dim
    return torch.randn(shape, device="cuda", generator=generator)


@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_chunk_is_the_eager_one_whatever_was_captured_before(compile: bool) -> None:
    torch._dynamo.reset()
    model = small_model(CONFIG).cuda().eval()
    captured = CapturedChunk(model, compile)
    for seed, rows in enumerate((["iipp"], ["iippp"], ["iipp"], ["ip"], ["iipp", "ippp"], ["iippp"])):
        batch = prompts(*rows, seed=seed)
        noise = noise_of(batch, seed)
        torch.testing.assert_close(captured(batch, noise, 4), model.chunk(batch, noise, 4), rtol=1e-4, atol=1e-5)


def test_a_captured_chunk_goes_on_from_given_actions() -> None:
    model = small_model(CONFIG).cuda().eval()
    captured = CapturedChunk(model)
    for count in (1, 2):
        batch = prompts("iipp", "ippp", seed=count)
        noise, given = noise_of(batch, 1), noise_of(batch, 2)
        num_given = torch.tensor([count, 0], device="cuda")
        found = captured(batch, noise, 4, given, num_given)
        torch.testing.assert_close(found, model.chunk(batch, noise, 4, given, num_given), rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0, :count], given[0, :count])


def test_a_captured_chunk_follows_weights_that_changed_or_moved() -> None:
    model = small_model(CONFIG).cuda().eval()
    captured, batch = CapturedChunk(model), prompts("iipp")
    noise = noise_of(batch)
    captured(batch, noise)
    with torch.no_grad():
        model.flow_head.action_out_proj.weight.mul_(2)
    torch.testing.assert_close(captured(batch, noise), model.chunk(batch, noise), rtol=1e-4, atol=1e-5)
    model.flow_head.action_out_proj.weight.data = model.flow_head.action_out_proj.weight.data * 0.5
    torch.testing.assert_close(captured(batch, noise), model.chunk(batch, noise), rtol=1e-4, atol=1e-5)


def test_a_captured_chunk_leaves_what_it_was_given_alone() -> None:
    model = small_model(CONFIG).cuda().eval()
    captured, first, second = CapturedChunk(model), prompts("iipp"), prompts("iipp", seed=1)
    noise, tokens = noise_of(first), first.tokens.clone()
    captured(first, noise)
    captured(second, noise_of(second, 1))
    assert torch.equal(first.tokens, tokens)
    assert torch.equal(noise, noise_of(first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_layer_on_cuda_is_the_cpus(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Linear(256, 512, dtype=dtype)
    on_cpu, x = CLASSES[kind](plain), torch.randn(7, 256, dtype=dtype)
    on_cuda, on_x = CLASSES[kind](deepcopy(plain).cuda()), x.cuda().requires_grad_()
    torch.testing.assert_close(on_cuda.dequantized(dtype).cpu(), on_cpu.dequantized(dtype))
    out = on_cuda(on_x)
    out.sum().backward()
    assert on_x.grad is not None
    torch.testing.assert_close(out.cpu(), on_cpu(x), rtol=1e-2, atol=1e-2)
    expected = on_cpu.dequantized(dtype).sum(0).expand(7, -1)
    torch.testing.assert_close(on_x.grad.cpu(), expected, rtol=1e-2, atol=1e-2)
