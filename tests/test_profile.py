"""`pi05 profile`: its counts are PyTorch's own, its parts add up, and no size needs memory to be counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.cli.profile import Plan, profile, read_config
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.profiling.parts import PARTS, Book, Clock, Work, parameters_of, training_step
from tests.models.small import small_config, small_model

WORK = Work(batch_size=2, cameras=2, prompt_tokens=5, target_tokens=4, draws=2)


def plan(config: ModelConfig | None = None, work: Work = WORK, checkpointing: bool = False) -> Plan:
    return Plan(config or small_config(), work, num_steps=3, checkpointing=checkpointing, dtype=torch.float32)


@pytest.mark.parametrize("train", [True, False])
def test_flops_of_the_parts_add_up_to_pytorchs_count(train: bool) -> None:
    with FlopCounterMode(display=False) as counter:
        plan().run(plan().model("meta"), "meta", train, Book())
    assert sum(plan().count(train).flops.values()) == counter.get_total_flops()


def test_cutting_the_graph_changes_no_gradient() -> None:
    config, model = small_config(), small_model()
    batch = WORK.batch(config)
    training_step(model, batch, WORK, Book())
    cut = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    out = model(batch)
    (out["flow"].values.mean() + out["fast"].values.mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(cut[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_insulation_saves_the_backbones_backward_of_the_flow_loss() -> None:
    flow_only = Work(prompt_tokens=5)
    insulated = Work(prompt_tokens=5, insulate=True)
    flops = {work: plan(work=work).count(train=True).flops for work in (flow_only, insulated)}
    assert flops[insulated]["vision"] < flops[flow_only]["vision"] / 2


def test_checkpointing_costs_flops_and_saves_activations() -> None:
    deep = small_config(depth=4)
    work = Work(batch_size=4, prompt_tokens=50)
    plain, checkpointed = plan(deep, work), plan(deep, work, checkpointing=True)
    assert sum(checkpointed.count(True).flops.values()) > sum(plain.count(True).flops.values())
    assert checkpointed.memory()["activations, peak"] < plain.memory()["activations, peak"]


def test_every_parameter_is_in_one_part() -> None:
    model = small_model()
    parts = parameters_of(model)
    assert list(parts) == list(PARTS)
    assert sum(p.numel() for found in parts.values() for p in found) == sum(p.numel() for p in model.parameters())


def test_every_part_takes_time() -> None:
    clock = Clock(lambda: None)
    training_step(small_model(), WORK.batch(small_config()), WORK, clock)
    assert all(seconds > 0 for seconds in clock.seconds.values())


def test_full_size_is_counted_without_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    counter = plan(ModelConfig(), Work()).count(train=True)
    assert sum(counter.flops.values()) == pytest.approx(7.99e12, rel=0.01)  # LeRobot's: 13.6e12


def test_a_runs_file_gives_dimensions_batch_and_draws() -> None:
    config, settings = read_config(["configs/tiny.yaml"])
    assert config == ModelConfig.preset("tiny")
    assert settings["data"]["batch_size"] == 32


def test_a_models_file_is_a_configuration(tmp_path: Path) -> None:
    assert read_config(["configs/model/debug.yaml"])[0] == ModelConfig.preset("debug")


def test_later_files_win(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("model: {config: {horizon: 3}}\ndata: {batch_size: 5}\n")
    config, settings = read_config(["debug", str(tmp_path / "more.yaml")])
    assert (config.horizon, config.vocab_size, settings["data"]["batch_size"]) == (3, 4096, 5)


def test_a_file_without_dimensions_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("data: {batch_size: 5}\n")
    with pytest.raises(ValueError, match="put a model's size first"):
        read_config([str(tmp_path / "data.yaml")])


def test_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    profile("debug", batch_size=1)
    printed = capsys.readouterr().out
    for words in ("training step", "one action chunk", "memory of a training step", "of the rate", "NVIDIA H100"):
        assert words in printed
