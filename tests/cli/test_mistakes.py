"""What a user got wrong is said in a line or two that name the option, before data is read, without a traceback."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pi05_lightning.cli.main import main
from pi05_lightning.cli.run import check_dimensions
from pi05_lightning.models.config import ModelConfig

OUT_OF_RANGE = {
    "model.config.horizon": "0",
    "model.config.action_dim": "-1",
    "model.config.vocab_size": "0",
    "model.config.fast_vocab_size": "0",
    "model.config.fast_skip_tokens": "-1",
    "model.config.vision.patch_size": "0",
    "model.config.vision.image_size": "27",
    "model.config.vision.num_heads": "0",
    "model.config.language.width": "0",
    "model.config.language.num_kv_heads": "0",
    "model.config.expert.mlp_dim": "0",
    "model.lora": "{rank: 0}",
    "model.flow_draws": "0",
    "model.rtc_max_delay": "-1",
    "model.num_steps": "0",
    "model.accuracy_threshold": ".nan",
    "model.max_skipped_steps": "-1",
    "data.batch_size": "0",
    "data.num_workers": "-1",
    "data.length_window": "0",
    "data.max_bad_share": "1.5",
    "data.val_samples": "0",
    "data.augmentation.crop": ".nan",
    "data.augmentation.rotation": "-1",
    "data.augmentation.contrast": "2",
    "data.language.questions_per_sample": "0",
    "data.language.max_tokens": "0",
    "data.language.task_only_share": "2",
    "stages.pretrain_steps": "-1",
    "stages.flow_alpha": ".nan",
    "stages.pretrain.warmup_steps": "5",
    "stages.pretrain.final_lr_factor": "-1",
    "stages.pretrain.mixture_temperature": ".nan",
    "stages.pretrain.losses.text": ".inf",
    "stages.pretrain.freeze": "[no_such_part]",
    "stages.pretrain.lr_factors": "{no_such_part: 0.5}",
    "stages.pretrain.mixture": "{web/web_caption: -1}",
    "stages.posttrain.mixture": "{web/web_caption: .nan}",
    "stages.then": "[{name: a, steps: 2, warmup_steps: 3, losses: {text: 1}}]",
    "data.fast": "missing",
    "data.tokenizer": "missing",
    "data.sources.web.init_args.stream_rows": "0",
    "data.sources.web.init_args.box_range": ".nan",
    "data.sources.web.init_args.val_fraction": "1",
    "model.init_from": "missing",
    "seed_everything": "-1",
    "ema.decay": "1",
    "checkpoint.save_top_k": "-2",
    "checkpoint.every_n_train_steps": "null",
    "trainer.precision": "64-true",
    "trainer.devices": "0",
    "trainer.accelerator": "cuda",
    "trainer.strategy": "nope",
    "trainer.max_steps": "0",
    "trainer.accumulate_grad_batches": "0",
    "trainer.gradient_clip_val": "-1",
    "trainer.log_every_n_steps": "-1",
    "trainer.overfit_batches": "2",
    "trainer.check_val_every_n_epoch": "2",
    "trainer.val_check_interval": "10000",
    "trainer.num_sanity_val_steps": "-2",
    "trainer.min_steps": "-1",
    "trainer.max_time": "00:00:00:00",
    "trainer.barebones": "true",
    "trainer.default_root_dir": "elsewhere",
    "trainer.limit_train_batches": "0",
    "trainer.logger": "CometLogger",
    "run": "/dev/null/run",
}
"""An option of `pi05 fit`, and a value that it cannot have."""
SAID_OTHERWISE = {
    "trainer.logger": "comet",
    "run": "--run",
    "stages.pretrain_steps": "pretrain has -1 steps",
    "stages.then": "stage a: its warmup_steps are 3 and all of its steps 2",
    "data.fast": "is no FAST tokenizer",
    "model.init_from": "missing (in",
}


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(args)
    said = capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value.code)
    assert len(said.strip().splitlines()) <= 2, said
    return said


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_a_value_that_means_nothing_is_refused_by_its_name_before_data_is_read(
    option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "trainer.accelerator" and torch.cuda.is_available():
        pytest.skip("there is one")
    values = {"data.sources.web.init_args.path": str(tmp_path / "missing"), "run": str(tmp_path / "run")}
    flags = [word for key, value in (values | {option: OUT_OF_RANGE[option]}).items() for word in (f"--{key}", value)]
    said = refused(["fit", "-c", str(config), *flags], capsys)
    assert SAID_OTHERWISE.get(option, option.rpartition(".")[2]) in said


CSV = "{class_path: CSVLogger, init_args: {save_dir: logs, flush_logs_every_n_steps: 0}}"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("model.config.expert.head_dim", "3", "model.config.expert.head_dim: head_dim is 3: it must be even"),
        ("trainer.min_steps", "1000", "trainer.min_steps is 1000, and the run ends after 4 steps"),
        ("trainer.logger", CSV, "flush_logs_every_n_steps is 0: it must be at least 1"),
    ],
)
def test_a_value_that_does_not_fit_the_rest_is_refused_with_its_key_once(
    option: str, value: str, told: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["fit", "-c", str(config), f"--{option}", value, "--run", str(tmp_path / "run")], capsys)
    assert told in said
    assert said.count(option) == 1, said


def test_two_callbacks_that_write_the_same_checkpoints_are_refused_however_their_folder_is_called(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = (
        f"{{class_path: ModelCheckpoint, init_args: {{dirpath: {tmp_path}/run/checkpoints, filename: '{{step:08d}}'}}}}"
    )
    said = refused(["fit", "-c", str(config), "--trainer.callbacks", other, "--run", "run"], capsys)
    assert "two checkpoint callbacks would write the same files to run/checkpoints" in said


@pytest.mark.parametrize("value", ["0", "-1", ".nan", "00:01:00:00"])
def test_an_interval_of_validation_that_is_none_is_refused(
    value: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.val_check_interval", value, "--run", str(tmp_path / "run")]
    assert "val_check_interval" in refused(["fit", "-c", str(config), *flags], capsys)


ROBOT = "pi05_lightning.data.sources.lerobot.LeRobotConfig"


@pytest.mark.parametrize(
    "option",
    [
        "horizon_steps: 0",
        "horizon_seconds: -1",
        "relative_dims: [-1]",
        "tolerance_s: -1",
        "min_range: 0",
        "box_range: -1",
        "val_fraction: 1",
        "horizon_seconds: 1, horizon_steps: 1",
    ],
)
def test_an_option_of_a_recorded_data_set_is_refused_before_it_is_opened(
    option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{{robot: {{class_path: {ROBOT}, init_args: {{path: {tmp_path}/missing, {option}}}}}}}"
    said = refused(["fit", "-c", str(config), "--data.sources", source, "--run", str(tmp_path / "run")], capsys)
    assert option.partition(":")[0] in said


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("pi05_lightning.training.callbacks.examples.ValidationExamples", "first: -1"),
        ("pi05_lightning.training.callbacks.rollout.PeriodicRollout", "every_n_steps: 0"),
        ("StochasticWeightAveraging", "swa_epoch_start: 0.5, swa_lrs: 0.1"),  # when training starts
    ],
)
def test_what_a_callback_refuses_is_said_in_its_words(
    name: str, option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = f"{{class_path: {name}, init_args: {{{option}}}}}"
    said = refused(["fit", "-c", str(config), "--trainer.callbacks", made, "--run", str(tmp_path / "run")], capsys)
    assert option.partition(":")[0] in said
    assert "Namespace" not in said


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("trainer.deterministic", "maybe", "expected 'warn' or true or false, got maybe"),
        ("data.sources", "null", "data.sources: expected dict, got None"),
        ("model.lora", "{rank: 2, targets: [vision]}", "model.lora.targets: expected str, got ['vision']"),
        ("trainer.plugins", "nope", "trainer.plugins: nope is no known class: give its import path"),
        (
            "data.sources.webb.path",
            "x",
            "no source 'webb' (did you mean web?); there are web: a new one needs its class_path",
        ),
        (
            "data.sources",
            "{arm: {init_args: {path: x}}}",
            "no source 'arm'; there are web: a new one needs its class_path",
        ),
        ("trainer.callbacks", "EarlyStoping", "no known class (did you mean EarlyStopping?): give its import path"),
        ("stages", "3", "stages: expected the options below it, or a file with them, got 3"),
    ],
)
def test_a_value_of_another_type_is_said_without_the_parsers_words(
    flag: str, value: str, told: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["fit", "-c", str(config), f"--{flag}", value], capsys)
    assert said.splitlines()[0].endswith(told)


def test_a_source_that_a_later_file_has_replaced_is_named_where_it_is_asked_for(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    sources = "pi05_lightning.data.sources"
    other.write_text(
        f"data: {{sources: {{arm: {{class_path: {sources}.lerobot.LeRobotConfig, init_args: {{path: x}}}}}}}}"
    )
    args = ["fit", "-c", str(config), "-c", str(other)]
    said = refused([*args, "--data.sources.web.path", "y"], capsys).splitlines()[0]
    assert said.endswith(
        "there is no source 'web' any more, as this replaces all that are named before it: name it here too"
    )
    assert f"{other}, line 1: data.sources" in said
    other.write_text(f"data: {{sources: {{arm: {{class_path: {sources}.base.SourceConfig}}}}}}")
    assert "any more" not in refused(args, capsys)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["check", "run", "--env", "Metaworld"], "env: Metaworld is no known class (did you mean MetaWorld?)"),
        (["stats", "data", "--keys", "action"], "keys: expected a list, as '[action]'"),
        (["check", "run", "--cameras", "top"], "cameras: expected pairs, as '{name: value}', got top"),
        (
            ["export", "run", "--out", "x", "--format", "onx"],
            "'openvino' or 'onnx' or 'pt2', got onx (did you mean onnx?)",
        ),
        (
            ["experience", "x", "--policy", "run", "--demonstrations", "runs/x"],
            "demonstrations: expected a list, as '[runs/x]'",
        ),
        (
            ["experience", "x", "--policy", "run", "--demonstrations", "[a]", "--methods", "[recaps]"],
            "'demonstrations', got recaps (did you mean recap?)",
        ),
    ],
)
def test_a_value_of_another_type_is_told_with_what_to_write(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(args, capsys)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("stages.pretrain.lr_factors.vision", "stages: {pretrain: {lr_factors: {vision: -1.0}}}"),
        ("stages.posttrain.mixture.web/web_caption", "stages:\n  posttrain: {mixture: {web/web_caption: .nan}}"),
        ("stages.posttrain.warmup_steps", "stages:\n  pretrain: {warmup_steps: 0}\n  posttrain: {warmup_steps: -1}"),
        ("data.sources.web.init_args.stream_rows", "data: {sources: {web: {class_path: %s, init_args: %s}}}"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_whole_key_and_its_line(
    where: str, text: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "layer.yaml"
    source = ("pi05_lightning.data.sources.vision_text.VisionTextConfig", "{path: missing, stream_rows: 0}")
    file.write_text(text % source if "%s" in text else text)
    said = refused(["fit", "-c", str(config), "-c", str(file), "--run", str(tmp_path / "run")], capsys)
    assert f"{file}, line {len(text.splitlines())}: {where}: " in said


@pytest.mark.parametrize("name", ["wbe/web_caption", "web/web_capton"])
def test_a_misspelt_name_in_a_mixture_is_refused_before_data_is_read(
    name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--data.sources.web.init_args.path", str(tmp_path / "missing"), "--run", str(tmp_path / "run")]
    said = refused(["fit", "-c", str(config), *missing, "--stages.pretrain.mixture", f"{{{name}: 1}}"], capsys)
    assert f"stage pretrain, mixture: there is no {name} (did you mean web/web_caption?)" in said
    assert "data.sources are web, each with what its data have of web_caption" in said


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: val/nope}}"],
        ["--trainer.callbacks", "{class_path: ModelCheckpoint, init_args: {monitor: val/nope, filename: best}}"],
        ["--checkpoint.filename", "{step}-{val/nope:.2f}"],
    ],
)
def test_a_metric_that_nothing_logs_is_refused_before_the_first_step_whoever_asks_for_it(
    flags: list[str], config: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"is val/nope, which no validation of this run logs\. Nearest: val/"):
        main(["fit", "-c", str(config), "--run", str(tmp_path / "run"), *flags])
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("interval", "told"), [(100, "first logged after 100 batches, and validation begins after"), (0, "which no valid")]
)
def test_a_training_loss_that_is_not_logged_in_time_is_refused(
    interval: int, told: str, config: Path, tmp_path: Path
) -> None:
    stop = ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: loss}}"]
    with pytest.raises(SystemExit, match=f"monitor of EarlyStopping is loss, .*{told}"):
        main(["fit", "-c", str(config), "--run", str(tmp_path), *stop, "--trainer.log_every_n_steps", str(interval)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [
                "--trainer.callbacks",
                "{class_path: EarlyStopping, init_args: {monitor: val/web/web_caption/exact_match}}",
            ],
            "exact_match, of which more is better, and its mode is min",
        ),
        (
            ["--checkpoint.monitor", "val/web/web_caption/exact_match"],
            "exact_match, of which more is better, and its mode is min",
        ),
        (
            ["--checkpoint.monitor", "val/web/web_caption/cross_entropy", "--checkpoint.mode", "max"],
            "cross_entropy, of which less is better, and its mode is max",
        ),
    ],
)
def test_a_mode_that_would_keep_the_worst_is_refused(
    flags: list[str], message: str, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["fit", "-c", str(config), "--run", str(tmp_path / "run"), *flags])


@pytest.mark.slow
def test_metrics_that_are_logged_may_be_asked_for(config: Path, tmp_path: Path) -> None:
    metric = "val/web/web_caption/cross_entropy"
    made = f"{{class_path: EarlyStopping, init_args: {{monitor: {metric}}}}}"
    name = ["--checkpoint.filename", f"{{step:03d}}-{{{metric}:.1f}}"]
    main(["fit", "-c", str(config), "--run", str(tmp_path / "run"), "--trainer.callbacks", made, *name])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("option", ["lr: -1", "lr: .nan", "lr: .inf", "weight_decay: -1", "betas: [0.9, 1.5]"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adam"])
def test_an_optimizer_that_cannot_be_is_refused_before_data_is_read(
    optimizer: str, option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--data.sources.web.init_args.path", str(tmp_path / "missing"), "--run", str(tmp_path / "run")]
    made = f"{{class_path: torch.optim.{optimizer}, init_args: {{lr: 1.0e-3, {option}}}}}"
    made = made.replace("lr: 1.0e-3, lr", "lr")
    assert "model.optimizer" in refused(["fit", "-c", str(config), "--model.optimizer", made, *missing], capsys)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is no configuration"),
        ("stages:\n", "stages is empty"),
        ("acting:\n", "acting is empty"),
        ("stages: {}\nmodel: [\n", "not valid YAML"),
        ("ema: {decay: 0.9}\nstages: {flow_alpha: 1}\nema: {decay: 0.8}\n", r"ema stands twice, in lines 1 and 3"),
        ("stages:\n  pretrain:\n    losses:\n      text: 1\n      text: 2\n", "pretrain.losses.text stands twice"),
    ],
)
def test_a_file_that_says_nothing_or_a_key_twice_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    file = tmp_path / "layer.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", str(config), "-c", str(file), "--run", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert named in said
    assert str(file) in said


def test_a_checkpoint_of_another_model_is_told_by_the_dimensions_that_differ(
    finished_run: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = ["--model.config.language.mlp_dim", "256", "--run", str(tmp_path / "run")]
    said = refused(["fit", "-c", str(config), "--ckpt_path", str(finished_run), *wider], capsys)
    was = ModelConfig.preset("debug").language.mlp_dim
    assert f"model.config.language.mlp_dim is 256, and {was} in the checkpoint" in said


def test_of_another_model_a_few_differences_are_listed_behind_what_to_do(finished_run: Path) -> None:
    other = ModelConfig.preset("tiny").to_dict()
    with pytest.raises(ValueError, match=r"is of another model\. Leave it as it was, .*; and \d+ more$") as refusal:
        check_dimensions(finished_run, other)
    assert str(refusal.value).count("in the checkpoint") == 3


def test_swapped_arguments_of_a_push_are_told(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run.parent.parent)
    with pytest.raises(SystemExit, match="is here: name what is pushed first, and then user/name"):
        main(["push", "user/name", str(finished_run.relative_to(Path.cwd()))])


def test_a_truncated_checkpoint_is_named(
    finished_run: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished_run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    args = ["fit", "-c", str(config), "--ckpt_path", str(tmp_path / "half.ckpt"), "--run", str(tmp_path / "run")]
    assert f"{tmp_path / 'half.ckpt'} is truncated" in refused(args, capsys)


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file can be larger than a tenth of a megabyte: writing on fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_with_too_little_room_for_two_checkpoints_is_told_before_the_first_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    main(["fit", "-c", str(config), "--run", str(tmp_path / "run")])
    assert "there are two while one is written, and 0.0 GiB are free" in caplog.text


@pytest.mark.usefixtures("little_room")
def test_a_checkpoint_that_there_is_no_room_for_is_said_so(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "could not be written" in refused(["fit", "-c", str(config), "--run", str(tmp_path / "run")], capsys)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
