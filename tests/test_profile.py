"""`pi05 profile`: its counts are PyTorch's own, its parts add up, and no size needs memory to be counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.cli.profile import profile, read_run
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.profiling.cost import COMPONENTS, Stopwatch, measure_chunk, measure_training_step, parameters_of
from pi05_lightning.profiling.rate import matmul_rate
from pi05_lightning.profiling.step import StepShape, training_loss
from pi05_lightning.profiling.strategies import Strategy, count
from pi05_lightning.profiling.workload import Workload
from pi05_lightning.training.run_directory import write_config
from pi05_lightning.weights.folder import save
from tests.models.small import small_config, small_model

SHAPE = StepShape(batch_size=2, cameras=2, prompt_tokens=5, target_tokens=4, draws=2)
CPU = torch.device("cpu")


def work(shape: StepShape = SHAPE, config: ModelConfig | None = None, **options: bool) -> Workload:
    return Workload(config or small_config(), shape, num_steps=3, **options)


def step_flops(work: Workload) -> dict[str, int]:
    return work.count(train=True).flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_the_components_add_up_to_pytorchs_count_of_a_step(checkpointing: bool) -> None:
    counted = work(checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counter:
        training_loss(counted.model("meta"), SHAPE.batch(counted.config, "meta")).backward()
    assert sum(step_flops(counted).values()) == counter.get_total_flops()


def test_flops_of_the_components_add_up_to_pytorchs_count_of_a_chunk() -> None:
    model, batch = work().model("meta"), SHAPE.for_chunk.batch(small_config(), "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.flow_head.sample(model.backbone(batch, need_hidden=False), batch.noise, 3)
    assert sum(work().count(train=False).flops.values()) == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_pass_is_booked_to_the_component_of_the_forward_pass(checkpointing: bool) -> None:
    scaled = StepShape(batch_size=2, cameras=4, prompt_tokens=5, target_tokens=4, draws=2)
    more_images = step_flops(work(scaled, checkpointing=checkpointing))
    flops = step_flops(work(checkpointing=checkpointing))
    assert more_images["vision"] == 2 * flops["vision"]
    assert more_images["logits"] == flops["logits"]


def test_logits_cost_three_products_with_the_embedding() -> None:
    config, targets = small_config(), SHAPE.batch_size * SHAPE.target_tokens
    assert step_flops(work())["logits"] == 3 * 2 * targets * config.language.width * config.vocab_size


def test_insulation_saves_the_backbones_backward_of_the_flow_loss() -> None:
    flow_only = StepShape(prompt_tokens=5)
    insulated = step_flops(work(flow_only, insulate=True))
    assert insulated["vision"] < step_flops(work(flow_only))["vision"] / 2


def test_checkpointing_costs_flops_and_saves_activations() -> None:
    deep, shape = small_config(depth=4), StepShape(batch_size=4, prompt_tokens=50)
    plain, checkpointed = work(shape, deep), work(shape, deep, checkpointing=True)
    assert sum(step_flops(checkpointed).values()) > sum(step_flops(plain).values())
    assert count(checkpointed, Strategy(1)).activations < count(plain, Strategy(1)).activations


def test_every_parameter_is_in_one_component() -> None:
    model = small_model()
    components = parameters_of(model)
    assert list(components) == list(COMPONENTS)
    assert sum(p.numel() for found in components.values() for p in found) == sum(p.numel() for p in model.parameters())


def test_every_component_of_a_step_takes_time() -> None:
    watch = Stopwatch(CPU)
    measure_training_step(small_model(), SHAPE.batch(small_config()), False, watch)
    assert all(seconds > 0 for seconds in watch.seconds.values())


def test_chunk_takes_time_in_vision_language_model_and_action_expert() -> None:
    watch = Stopwatch(CPU)
    measure_chunk(small_model(), SHAPE.for_chunk.batch(small_config()), 3, watch)
    assert all(watch.seconds[name] > 0 for name in ("vision", "language model", "action expert"))


def test_full_size_is_counted_without_its_memory() -> None:
    flops = step_flops(Workload(ModelConfig(), StepShape()))
    assert sum(flops.values()) == pytest.approx(7.99e12, rel=0.01)  # LeRobot's: 13.6e12


def test_matrix_products_are_timed_without_random_numbers() -> None:
    before = torch.get_rng_state()
    assert matmul_rate(torch.float32, CPU, size=768) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_a_runs_file_gives_dimensions_batch_and_draws() -> None:
    config, settings = read_run(["configs/tiny.yaml"])
    assert config == ModelConfig.preset("tiny")
    assert settings["data.batch_size"] == 32


def test_a_models_file_is_a_configuration() -> None:
    assert read_run(["configs/model/debug.yaml"])[0] == ModelConfig.preset("debug")


def test_weights_give_their_dimensions(tmp_path: Path) -> None:
    save(tmp_path / "exported", small_model())
    assert read_run([str(tmp_path / "exported")])[0] == small_config()
    config, settings = read_run(["configs/tiny.yaml", str(tmp_path / "exported")])
    assert (config, settings["data.batch_size"]) == (small_config(), 32)


def test_a_run_is_counted_by_its_configuration(tmp_path: Path) -> None:
    save(tmp_path / "run", small_model())
    for content, batch_size in (("data: {batch_size: 5}\n", 5), ("model: {flow_draws: 2}\n", 32)):
        write_config(tmp_path / "run", content)
        config, settings = read_run([str(tmp_path / "run")])
        assert (config, settings["data.batch_size"]) == (small_config(), batch_size)
    (tmp_path / "run" / "config.yaml").write_text("data: {batch_size: 5}\n")  # of something else
    assert read_run([str(tmp_path / "run")])[1]["data.batch_size"] is None


def test_later_files_win(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("model: {config: {horizon: 3}}\ndata: {batch_size: 5}\n")
    config, settings = read_run(["debug", str(tmp_path / "more.yaml")])
    assert (config.horizon, config.vocab_size, settings["data.batch_size"]) == (3, 4096, 5)


def test_a_file_without_dimensions_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("data: {batch_size: 5}\n")
    with pytest.raises(ValueError, match="put a model's size first"):
        read_run([str(tmp_path / "data.yaml")])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model: {config: {vision: {widht: 3}}}", "bad.yaml: .*model.config.*widht"),
        ("model: {config: {vision: {width: 30}}}", "bad.yaml: .*width 30 is not a multiple of num_heads"),
        ("model: {flow_draws: many}", "bad.yaml: .*model.flow_draws"),
        ("model: {config: {horizon: null}}", "horizon is null"),
        ("{horizn: 8, action_dim: 3}", "bad.yaml: .*horizn"),
        ("model: {config: absent.yaml}", "bad.yaml: .*model.config.*absent.yaml"),
        ("- 3", "bad.yaml is no configuration"),
        ("model: {config", "bad.yaml"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_key(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"(?s){named}"):
        read_run([str(tmp_path / "bad.yaml")])


def test_unknown_size_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="shipped models are base, debug, tiny"):
        read_run(["huge"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cameras": 3}, "cameras is 3, and this model was made for 2 at most"),
        ({"utilization": 40}, "utilization is 40: it must be above 0 and at most 1"),
    ],
)
def test_sizes_that_make_no_step_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        profile("tiny", **options)


@pytest.mark.parametrize(
    ("run", "precision"),
    [
        ("trainer: {max_epochs: 1}", "bf16"),
        ("trainer: {accelerator: gpu}", "bf16"),
        ("trainer: {accelerator: cpu}", "fp32"),
        ("trainer: {precision: 32-true}", "fp32"),
    ],
)
def test_a_run_without_a_precision_is_counted_in_what_fit_takes(
    run: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(run)
    profile(["debug", str(tmp_path / "run.yaml")], measure=False)
    assert f" {precision}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ("model: {lora: {rank: 4}}", r"model\.lora: .*`pi05 fit` says .*`--devices 2` counts"),
        ("model: {lora: {rank: 4}, base: nf4}", r"model\.lora and model\.base: "),
        ("stages: {posttrain: {freeze: [vision]}}", r"stages\.posttrain\.freeze: .* loads anything$"),
        ("stages: {then: [{name: last, steps: 1, freeze: [vision]}]}", r"stages\.then: "),
    ],
)
def test_a_run_that_trains_less_than_everything_is_refused(run: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run)
    with pytest.raises(ValueError, match=named):
        profile(["debug", str(tmp_path / "run.yaml")], measure=False)


def test_what_a_stage_without_steps_freezes_counts_for_nothing(tmp_path: Path) -> None:
    then = "[{name: last, steps: 0, freeze: [vision]}]"
    (tmp_path / "run.yaml").write_text(f"stages: {{pretrain_steps: 0, pretrain: {{freeze: [vision]}}, then: {then}}}")
    profile(["debug", str(tmp_path / "run.yaml")], measure=False)


def test_a_run_with_adapters_is_counted_by_strategy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {lora: {rank: 4}}")
    profile(["debug", str(tmp_path / "run.yaml")], devices=2)


def test_a_strategy_is_of_several_ranks() -> None:
    with pytest.raises(ValueError, match="ddp is of several ranks: give --devices"):
        profile("debug", strategy="ddp")


def test_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    profile("debug", batch_size=1)
    printed = capsys.readouterr().out
    for words in ("training step", "one action chunk", "memory of a training step", "of the rate", "NVIDIA H100"):
        assert words in printed
