"""Training features from the command line: a run with all of them is saved, validated and resumed by its path alone."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.cli.main import main
from pi05_lightning.module.trainer import callbacks_of
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import find_checkpoint
from tests.untrained import untrained_model, untrained_weights

from .conftest import STEPS


@pytest.fixture
def without_model(config: Path, tmp_path: Path) -> Path:
    """The configuration without the model's dimensions."""
    content = yaml.safe_load(config.read_text())
    del content["model"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


class Slow(Callback):
    """Says what was before it."""

    before: ClassVar[list[str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [type(callback).__name__ for callback in callbacks_of(trainer, Callback)]
        Slow.before = names[: names.index("Slow")]


def test_a_users_callback_comes_after_what_takes_a_batchs_time_and_before_what_stops_or_saves_the_run(
    config: Path, tmp_path: Path
) -> None:
    flag = f"[{{class_path: {__name__}.Slow}}]"
    main(["fit", "-c", str(config), "--run", str(tmp_path / "run"), "--trainer.callbacks", flag])
    assert {"Throughput", "StepTime", "StageSwitch"} <= {*Slow.before}
    assert not {"InterruptBetweenSteps", "Restart", "RunCheckpoint"} & {*Slow.before}


def test_run_that_begins_with_weights_goes_on_with_its_own_configuration_given_again(
    without_model: Path, tmp_path: Path
) -> None:
    """As a requeued job does; the weights say the dimensions."""
    start, run = untrained_weights(tmp_path / "start"), tmp_path / "run"
    begin = ["fit", "-c", str(without_model), "--model.init_from", str(start), "--run", str(run)]
    main([*begin, "--resume", "auto"])
    main([*begin, "--resume", "auto", "--stages.pretrain_steps", str(STEPS + 1)])
    assert torch.load(find_checkpoint(run), weights_only=False)["global_step"] == STEPS + 1


def test_all_features_from_flags(without_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = untrained_model()
    save(tmp_path / "start", start)
    run = tmp_path / "run"
    flags = {
        "model.init_from": str(tmp_path / "start"),
        "model.lora.rank": "2",
        "model.activation_checkpointing": "true",
        "ema.decay": "0.9",
        "trainer.precision": "bf16-mixed",
        "trainer.enable_progress_bar": "null",
    }
    main(["fit", "-c", str(without_model), "--run", str(run), *(w for k, v in flags.items() for w in (f"--{k}", v))])
    assert f"step {STEPS}/{STEPS}  pretrain" in capsys.readouterr().out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["config"]["horizon"] == start.config.horizon

    main(["validate", str(run)])
    (tmp_path / "start").rename(tmp_path / "moved")
    base = str(tmp_path / "moved")
    main(["fit", "--ckpt_path", str(run), "--stages.pretrain_steps", str(STEPS + 1), "--model.init_from", base])
    checkpoint = torch.load(find_checkpoint(run), weights_only=True)
    assert checkpoint["global_step"] == STEPS + 1
    assert checkpoint["pi05"]["adapter_base"]["place"] == base
    merged = locate(run).model().get_parameter("backbone.layers.0.mlp.up_proj.weight")
    expected = start.state_dict()["backbone.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(merged, expected)
    torch.testing.assert_close(merged, expected, atol=0.1, rtol=0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_shipped_fine_tuning_trains_given_weights_on_a_given_dataset(
    precision: str, videos: Path, tmp_path: Path
) -> None:
    start = untrained_model()
    save(tmp_path / "start", start)
    flags = {
        "model.init_from": str(tmp_path / "start"),
        "data.tokenizer": "tiny",
        "data.sources.robot.path": str(videos),
        "data.batch_size": "2",
        "data.num_workers": "0",
        "stages.posttrain_steps": "2",
        "stages.posttrain.warmup_steps": "0",
        "trainer.accelerator": "cpu",
        "trainer.precision": precision,
        "run": str(tmp_path / "run"),
    }
    main(["fit", "-c", "configs/finetune.yaml", *(w for k, v in flags.items() for w in (f"--{k}", v))])
    weights = locate(tmp_path / "run")
    assert weights.processor().language.condition_on == "task"
    trained = {name for name, value in weights.tensors().items() if not torch.equal(value, start.state_dict()[name])}
    assert any(name.startswith("flow_head.layers") for name in trained)
    assert any(name.startswith("backbone.layers") for name in trained)


def test_one_batch_stays_one_and_the_whole_the_whole_in_flags_and_files(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("trainer: {limit_test_batches: 1, limit_predict_batches: 1.0}")
    flags = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1.0"]
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "-c", str(layer), *flags, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    found = [repr(trainer[f"limit_{part}_batches"]) for part in ("train", "val", "test", "predict")]
    assert found == ["1", "1.0", "1", "1.0"]


def test_fit_without_dimensions_and_weights_says_so(without_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(without_model)])
    assert "no model: give its dimensions as model.config, or weights as model.init_from" in capsys.readouterr().err


def test_flag_for_a_source_that_layered_yaml_replaced_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", "configs/tiny.yaml", "-c", str(config), "--data.sources.robot.init_args.path", "elsewhere"])
    assert "names a source that the configuration does not have" in capsys.readouterr().err


@pytest.mark.slow
def test_flags_of_a_resumed_run_are_said_and_used(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, optimizer = tmp_path / "run", ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr"]
    main(["fit", "-c", str(config), "--run", str(run), *optimizer, "1e-3"])
    stages = ["--stages.pretrain_steps", str(STEPS + 2), "--stages.pretrain.final_lr_factor", "1"]
    main(["fit", "--ckpt_path", str(run), "--model.optimizer.lr", "5e-4", *stages])
    checkpoint = torch.load(find_checkpoint(run), weights_only=True)
    assert checkpoint["global_step"] == STEPS + 2
    assert {group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]} == {5e-4}
    said = next(r.getMessage() for r in caplog.records if "Other options than the checkpoint's" in r.getMessage())
    assert f"from step {STEPS} on" in said
    assert "model.optimizer.init_args.lr: 0.001 → 0.0005" in said
    assert f"stages.pretrain_steps: {STEPS} → {STEPS + 2}" in said
    assert len(said.splitlines()) == 4


@pytest.mark.slow
def test_a_resumed_run_without_other_flags_says_nothing_of_options(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", "-c", str(config), "--run", str(tmp_path), "--trainer.max_steps", "2"])
    main(["fit", "--ckpt_path", str(tmp_path)])
    assert "Other options than" not in caplog.text
    assert "the run is complete after 2 steps" in caplog.text
