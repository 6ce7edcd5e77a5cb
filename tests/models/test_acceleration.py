"""Activation checkpointing and compilation change time and memory, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pi05_lightning.models.acceleration import checkpoint_blocks, compile_calls
from pi05_lightning.models.config import ModelConfig, VisionConfig
from pi05_lightning.models.lora import Lora, add_adapters
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch

from .small import make_batch, small_config, small_model


@pytest.fixture
def config() -> ModelConfig:
    vision = VisionConfig(image_size=14, patch_size=14, width=24, depth=2, mlp_dim=32, num_heads=2)
    return small_config(depth=3, vision=vision)


@pytest.fixture
def batch(config: ModelConfig) -> Batch:
    return make_batch(config, ["iippss", "iptt", "pff"], acting=2, draws=2)


def step(model: Pi05, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of everything, and the gradients."""
    out = model(batch)
    loss = out.tokens.nll.mean() + out.flow.mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def count_block_runs(model: Pi05) -> Counter[str]:
    """A counter of how often every block's attention runs, from now on."""
    runs: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *args: runs.update([name])

    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(note(name))
    return runs


def test_every_block_runs_exactly_once_more(config: ModelConfig, batch: Batch) -> None:
    plain, checkpointed = small_model(config), small_model(config)
    checkpoint_blocks(checkpointed)
    before, after = count_block_runs(plain), count_block_runs(checkpointed)
    step(plain, batch)
    step(checkpointed, batch)
    assert len(before) == 2 + 3 + 3
    assert set(before.values()) == {1}
    assert after == dict.fromkeys(before, 2)


def test_checkpointing_leaves_loss_and_gradients_identical(config: ModelConfig, batch: Batch) -> None:
    plain, checkpointed = small_model(config), small_model(config)
    checkpoint_blocks(checkpointed)
    loss, gradients = step(plain, batch)
    other_loss, other_gradients = step(checkpointed, batch)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())


def test_checkpointing_keeps_less_for_the_backward_pass(config: ModelConfig, batch: Batch) -> None:
    def kept(model: Pi05) -> int:
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(batch)
        return sum(sizes.values())

    plain, checkpointed = small_model(config), small_model(config)
    checkpoint_blocks(checkpointed)
    assert kept(checkpointed) < 0.7 * kept(plain)


def test_checkpointing_repeats_the_dropout_of_the_adapters(config: ModelConfig, batch: Batch) -> None:
    losses = []
    for checkpointing in (False, True):
        model = small_model(config)
        torch.manual_seed(0)
        add_adapters(model, Lora(rank=2, dropout=0.5))
        if checkpointing:
            checkpoint_blocks(model)
        torch.manual_seed(1)
        _, gradients = step(model, batch)
        losses.append(gradients["backbone.layers.0.mlp.up_proj.lora_B.default.weight"])
    assert torch.equal(*losses)


def test_checkpointing_leaves_the_names_of_parameters(config: ModelConfig) -> None:
    model = small_model(config)
    names = list(model.state_dict())
    checkpoint_blocks(model)
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_compiler_reports_no_graph_break_in_the_two_calls(config: ModelConfig, batch: Batch, adapters: bool) -> None:
    torch._dynamo.reset()
    model = small_model(config)
    if adapters:
        add_adapters(model, Lora(rank=2))
    report = torch._dynamo.explain(model.backbone)(batch)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
    prefix, modulations = model.backbone(batch).rows(2), model.flow_head.modulate(batch.time)
    report = torch._dynamo.explain(model.flow_head)(batch.noise, modulations, prefix)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_calls_give_the_same_loss_and_gradients(
    config: ModelConfig, batch: Batch, checkpointing: bool
) -> None:
    torch._dynamo.reset()
    plain, compiled = small_model(config), small_model(config)
    if checkpointing:
        checkpoint_blocks(compiled)
    compile_calls(compiled)
    loss, gradients = step(plain, batch)
    other_loss, other_gradients = step(compiled, batch)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradients, gradients)
