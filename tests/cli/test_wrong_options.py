"""A wrong option, however deep, is named in full with its file, in a line or two, and with the key that was meant."""

from pathlib import Path

import pytest

from pi05_lightning.cli.main import main

SOURCE = "data: {sources: {web: {class_path: %s, init_args: {path: absent%s}}}}\n"
VISION_TEXT = "pi05_lightning.data.sources.vision_text.VisionTextConfig"


def message_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 2, told
    assert told.endswith("Every option: pi05 fit --help\n")
    return told


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("modle: {flow_draws: 3}", "modle.flow_draws", "model.flow_draws"),
        ("model: {flow_drwas: 3}", "model.flow_drwas", "model.flow_draws"),
        ("model: {config: {vision: {widht: 3}}}", "model.config.vision.widht", "model.config.vision.width"),
        ("model: {lora: {rnk: 3}}", "model.lora.rnk", "model.lora.rank"),
        (
            "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {weight_dcay: 0.1}}}",
            "model.optimizer.init_args.weight_dcay",
            "model.optimizer.init_args.weight_decay",
        ),
        (SOURCE % (VISION_TEXT, ", subst: a"), "data.sources.web.init_args.subst", "data.sources.web.init_args.subset"),
        ("data: {language: {prompts: {acton: a}}}", "data.language.prompts.acton", "data.language.prompts.action"),
        ("data: {augmentation: {crp: 3}}", "data.augmentation.crp", "data.augmentation.crop"),
        ("stages: {then: [{name: a, steps: 1}, {name: b, steps: 1, warmup: 3}]}", "stages.then[1].warmup", None),
        ("stages: {then: [{name: a, steps: 1, losses: {flw: 1}}]}", "stages.then[0].losses.flw", None),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: a, patienc: 3}}]}",
            "trainer.callbacks[0].init_args.patienc",
            "trainer.callbacks[0].init_args.patience",
        ),
        (
            "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dri: a}}}",
            "trainer.logger.init_args.save_dri",
            "trainer.logger.init_args.save_dir",
        ),
    ],
)
def test_unknown_key_in_a_file_is_named_in_full(
    text: str, key: str, meant: str | None, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"# a comment\n{text}\n")
    told = message_of(["fit", "-c", str(config), "-c", str(file)], capsys)
    assert f"{file}, line 2: there is no option {key}" in told
    assert meant is None or f"(did you mean {meant}?)" in told


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--model.config.vision.widht=3", "model.config.vision.width"),
        ("--model.optimizer.weight_dcay=3", "model.optimizer.weight_decay"),
        ("--data.sources.web.init_args.val_fractoin=0.5", "data.sources.web.init_args.val_fraction"),
        ("--stages.then=[{name: a, steps: 1, warmup_step: 3}]", "stages.then[0].warmup_steps"),
    ],
)
def test_unknown_key_in_a_flag_is_named_in_full(
    flag: str, meant: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = ["--model.optimizer", "torch.optim.AdamW"]
    assert f"(did you mean {meant}?)" in message_of(["fit", "-c", str(config), *optimizer, flag], capsys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SOURCE % (VISION_TEXT, ", val_fraction: much"), "data.sources.web.init_args.val_fraction: expected float"),
        (SOURCE % (f"{VISION_TEXT}s", ""), "data.sources.web.class_path: there is no VisionTextConfigs in"),
        (
            "trainer: {callbacks: [{class_path: EarlyStoping}]}",
            "callbacks[0].class_path: EarlyStoping is no known class",
        ),
        (
            "model: {optimizer: {class_path: torch.optim.AdamWs}}",
            "there is no AdamWs in torch.optim (did you mean AdamW?)",
        ),
        ("data: {batch_size: many}", "data.batch_size: expected int, got many"),
    ],
)
def test_value_that_does_not_fit_is_named_with_its_place(
    text: str, told: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "-c", str(file)])
    found = capsys.readouterr().err
    assert told in found
    assert str(file) in found
    assert "Every option: pi05 fit --help" in found


def test_class_inside_may_be_the_other_of_two(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # upstream tries one type after the other: the first one's refusal must not end it
    both = ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: a}}"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", str(config), *both, "--print_config"])
    assert stopped.value.code in (0, None)
