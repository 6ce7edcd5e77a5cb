"""Activation checkpointing and compilation change time and memory, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.models.config import ModelConfig, VisionConfig
from pi05_lightning.models.parallelize import Lora, add_adapters, checkpoint_blocks, compile_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch

from .small import make_batch, small_config, small_model, token_nll


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
    loss = token_nll(out).mean() + out["flow"].values.mean()
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


def test_blocks_that_get_no_gradient_run_no_more_than_before(config: ModelConfig, batch: Batch) -> None:
    model = small_model(config)
    checkpoint_blocks(model)
    runs = count_block_runs(model)
    model(batch, ["flow"], insulate=True)["flow"].values.mean().backward()
    # of the last language-model layer only keys and values are needed
    assert {name: n for name, n in runs.items() if "backbone" in name} == {
        **{f"backbone.vision.layers.{i}.self_attn": 1 for i in range(2)},
        **{f"backbone.layers.{i}.self_attn": 1 for i in range(2)},
    }
    assert {n for name, n in runs.items() if "flow_head" in name} == {2}


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
    def gradient(dropout: float, checkpointing: bool) -> Tensor:
        model = small_model(config)
        torch.manual_seed(0)
        add_adapters(model, Lora(rank=2, dropout=dropout))
        if checkpointing:
            checkpoint_blocks(model)
        torch.manual_seed(1)
        _, gradients = step(model, batch)
        return gradients["backbone.layers.0.mlp.up_proj.lora_B.default.weight"]

    assert torch.equal(gradient(0.5, checkpointing=False), gradient(0.5, checkpointing=True))
    assert not torch.equal(gradient(0.5, checkpointing=True), gradient(0.0, checkpointing=True))


def test_checkpointing_leaves_the_names_of_parameters(config: ModelConfig) -> None:
    model = small_model(config)
    names = list(model.state_dict())
    checkpoint_blocks(model)
    assert list(model.state_dict()) == names


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's compiler without what earlier processes left in its cache, files half written by killed ones included."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


KEYPOINTS = VisionConfig(image_size=16, width=8, num_heads=2, num_keypoints=4, keypoints_per_token=2)


@pytest.fixture
def traced(compiler: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the compiler says that it did; it traces and generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters.clear()
    return counters["stats"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("changed", [False, True], ids=["plain", "adapters, checkpointing, keypoints"])
def test_compiler_reports_no_graph_break_in_a_block(changed: bool, traced: Counter[str]) -> None:
    config = small_config(backbone_type="keypoint_gemma", vision=KEYPOINTS) if changed else small_config()
    model = small_model(config)
    if changed:
        add_adapters(model, Lora(rank=2, dropout=0.1))
    compile_blocks(model)
    if changed:
        checkpoint_blocks(model)
    step(model, make_batch(config, ["iippss", "iptt", "pff"], acting=2, draws=2))
    assert traced["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_blocks_of_a_kind_are_compiled_once_however_many(adapters: bool, traced: Counter[str]) -> None:
    graphs = []
    for depth in (3, 6):
        torch._dynamo.reset()
        traced.clear()
        config = small_config(depth=depth)
        model = small_model(config)
        if adapters:
            add_adapters(model, Lora(rank=2))
        compile_blocks(model)
        step(model, make_batch(config, ["iippss", "iptt", "pff"], acting=2, draws=2))
        graphs.append(traced["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_steps_are_compiled_and_what_needs_no_gradient_is_not(
    config: ModelConfig, batch: Batch, traced: Counter[str]
) -> None:
    model = small_model(config)
    compile_blocks(model)
    with torch.no_grad():
        model(batch)
    assert traced["unique_graphs"] == 0
    step(model, batch)
    assert traced["unique_graphs"] > 0


def test_counting_the_flops_of_the_first_step_leaves_the_next_ones_compiled(
    config: ModelConfig, batch: Batch, traced: Counter[str]
) -> None:
    model = small_model(config)
    compile_blocks(model)
    with FlopCounterMode(display=False) as flops:
        step(model, batch)
    assert flops.get_total_flops() > 0
    assert traced["unique_graphs"] == 0
    step(model, batch)
    assert traced["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_batches_of_many_shapes_stay_within_the_compilers_limit() -> None:
    config = small_config()
    model = small_model(config)
    compile_blocks(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(12):
            rows = ["i" * (1 + (seed + r) % 3) + "p" * (2 + (5 * seed + r) % 7) + "s" * (seed % 4) for r in range(4)]
            step(model, make_batch(config, [*rows, "ips"], acting=1 + seed % 4, draws=2, seed=seed))


def compare(checkpointing: bool) -> None:
    """Loss and gradients of a compiled step with those of a plain one."""
    config = small_config(depth=1)
    batch = make_batch(config, ["iippss", "iptt", "pff"], acting=2, draws=2)
    plain, compiled = small_model(config), small_model(config)
    compile_blocks(compiled)
    if checkpointing:
        checkpoint_blocks(compiled)
    loss, gradients = step(plain, batch)
    other_loss, other_gradients = step(compiled, batch)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradients, gradients)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_traced_blocks_give_the_same_loss_and_gradients(checkpointing: bool) -> None:
    compare(checkpointing)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_give_the_same_loss_and_gradients() -> None:
    compare(checkpointing=False)
