"""fp32, bf16 compute over fp32 weights, pure bf16: all run, agree, and keep in fp32 what must be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pi05_lightning.models.config import VisionConfig
from pi05_lightning.models.gemma import AdaRMSNorm, RMSNorm
from pi05_lightning.models.kernels import attend
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.siglip import LayerNorm
from pi05_lightning.types import Batch

from .small import make_batch, small_config, small_model, token_nll


@pytest.fixture
def model() -> Pi05:
    return small_model(small_config(depth=3))


@pytest.fixture
def batch(model: Pi05) -> Batch:
    return make_batch(model.config, ["iippss", "iptt", "pff"], acting=2, draws=2)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_losses_are_fp32_and_agree_in_every_precision(model: Pi05, batch: Batch) -> None:
    exact = model(batch)
    with autocast():
        mixed = model(batch)
    pure = model.bfloat16()(batch)
    for out in (mixed, pure):
        for found, expected in ((token_nll(out), token_nll(exact)), (out["flow"].values, exact["flow"].values)):
            assert found.dtype == torch.float32
            assert (found.mean() - expected.mean()).abs() < 0.03 * expected.mean()


def test_keypoints_agree_in_every_precision() -> None:
    vision = VisionConfig(image_size=16, width=8, num_heads=1, num_keypoints=4, keypoints_per_token=2, max_cameras=2)
    torch.manual_seed(0)
    stem = KeypointStem(vision, 32)
    stem.reset_parameters()
    images, camera = torch.rand(3, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 0])
    exact, _ = stem(images, camera)
    with autocast():
        mixed, _ = stem(images, camera)
    pure, seen = stem.bfloat16()(images.bfloat16(), camera)
    for tokens in (mixed, pure):
        assert (tokens - exact).norm() < 0.1 * exact.norm()  # the finest feature has 16 periods in the image
    assert pure.dtype == torch.bfloat16
    assert seen["keypoints"].dtype == torch.float32


def test_mixed_precision_gives_fp32_gradients_to_fp32_weights(model: Pi05, batch: Batch) -> None:
    with autocast():
        out = model(batch)
    (token_nll(out).mean() + out["flow"].values.mean()).backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_generation_and_sampling_run_in_bf16(model: Pi05, batch: Batch) -> None:
    model.bfloat16()
    with torch.no_grad():
        prefix = model.backbone(batch)
    _, _, extended = model.subtask_head.generate(model.backbone, prefix, max_tokens=4)
    noise = torch.randn(3, 1, model.config.horizon, model.config.action_dim)
    chunk = model.flow_head.sample(extended, noise, 3)
    assert chunk.dtype == torch.float32
    assert chunk.isfinite().all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_norms_of_bf16_values_are_computed_in_fp32(adaptive: bool) -> None:
    x = (torch.randn(1, 1, 5, 64) * 50).bfloat16()
    norm = (AdaRMSNorm if adaptive else RMSNorm)(64).bfloat16()
    modulation = torch.zeros(1, 1, 1, 192, dtype=torch.bfloat16)
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    normed = norm(x, modulation)[0] if adaptive else norm(x)
    assert torch.equal(normed, exact.bfloat16())


def test_vision_norm_of_bf16_values_is_computed_in_fp32() -> None:
    x = (torch.randn(64, 96) * 50 + 30).bfloat16()
    norm = LayerNorm(96, eps=1e-6).bfloat16()
    exact = torch.nn.functional.layer_norm(x.float(), (96,), norm.weight.float(), norm.bias.float(), 1e-6)
    assert torch.equal(norm(x), exact.bfloat16())


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_of_bf16_attention_has_fp32_statistics(masked: bool) -> None:
    # 4096 equal scores: weights of 1/4096 summed in bf16 would stall at a fraction of 1
    q, k = torch.zeros(1, 2, 8, 32).bfloat16(), torch.zeros(1, 2, 4096, 32).bfloat16()
    v = torch.ones(1, 2, 4096, 32).bfloat16()
    mask = torch.ones(1, 1, 8, 4096, dtype=torch.bool) if masked else None
    out = attend(q, k, v, mask)
    assert torch.equal(out, torch.ones_like(out))


def test_products_that_a_cpu_is_slow_at_are_zero_in_every_thread_and_numpy_does_not_warn_of_it() -> None:
    """In a process of its own: a thread has what the importing one had when it was started."""
    check = (
        "import warnings, numpy as np, torch, pi05_lightning.models.pi05; torch.set_num_threads(2);"
        " assert not (torch.full((1_000_000,), 1e-39) * 0.5).any();"
        " warnings.simplefilter('error'); np.finfo(np.float32).smallest_subnormal, repr(np.finfo(np.float64))"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
