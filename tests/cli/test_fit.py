"""`pi05 fit` and `validate`: a run's directory, its checkpoints, and what can be done with their paths alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pi05_lightning.cli.arguments import last_run
from pi05_lightning.cli.main import main
from pi05_lightning.evaluation.report.run import read_curves
from pi05_lightning.weights.training_checkpoint import find_checkpoint

from .conftest import STEPS


def load(run: Path) -> dict:
    return torch.load(find_checkpoint(run), weights_only=True)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


def test_fit_leaves_configuration_checkpoint_and_events(finished_run: Path) -> None:
    names = {path.name.split(".")[0] for path in finished_run.iterdir()}
    assert {"config", "checkpoints", "events"} <= names


def test_checkpoint_carries_the_configuration_of_its_run(finished_run: Path) -> None:
    saved = (finished_run / "config.yaml").read_text()
    assert yaml.safe_load(load(finished_run)["config"]) == yaml.safe_load(saved)


def test_saved_configuration_says_nothing_of_where_the_run_lies(finished_run: Path) -> None:
    assert str(finished_run) not in (finished_run / "config.yaml").read_text()


def test_saved_configuration_starts_the_same_run_elsewhere(finished_run: Path, tmp_path: Path) -> None:
    main(["fit", "-c", str(finished_run / "config.yaml"), "--run", str(tmp_path / "again")])
    again, first = load(tmp_path / "again"), load(finished_run)
    assert all(torch.equal(again["state_dict"][name], value) for name, value in first["state_dict"].items())


def test_seed_reaches_model_and_data(config: Path, finished_run: Path, tmp_path: Path) -> None:
    main(["fit", "-c", str(config), "--run", str(tmp_path / "other"), "--seed_everything", "1"])
    other, first = load(tmp_path / "other"), load(finished_run)
    assert any(not torch.equal(other["state_dict"][name], value) for name, value in first["state_dict"].items())


def test_fit_refuses_a_directory_that_holds_a_run(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "--run", str(run)])
    assert f"resume it with --ckpt_path {run}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        (["--stages.posttrain.losses.location", "1"], "no head of this model has the loss 'location'"),
        (["--stages.pretrain.losses.others", "{text2: 1}"], r"'text2' \(did you mean text\?\)"),
        (["--stages.then", "[{name: pretrain, steps: 2}]"], "two stages are called pretrain"),
        (["--stages.then", "[{name: more, steps: -2}]"], "stage more has -2 steps"),
    ],
)
def test_recipe_that_cannot_be_followed_is_refused_before_the_data_is_opened(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str], named: str
) -> None:
    missing = ["--data.sources.web.init_args.path", str(tmp_path / "missing")]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", str(config), "--run", str(tmp_path / "run"), *flag, *missing])
    assert re.search(named, f"{ended.value.code} {capsys.readouterr().err}")


@pytest.mark.parametrize("path", ["", "checkpoints/last.ckpt"])
def test_validate_needs_no_more_than_a_path(run: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", str(run / path)])
    assert "web/web_caption" in capsys.readouterr().out


def test_validate_writes_the_metrics_of_every_modality(run: Path) -> None:
    main(["validate", str(run)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert {name for name, values in metrics.items() if values["samples"]} == {"web/web_caption"}
    assert "cross_entropy" in metrics["web/web_caption"]


def test_measuring_nothing_is_an_error_and_leaves_what_was_measured(run: Path) -> None:
    main(["validate", str(run)])
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "measured.json", "questions.json")}
    with pytest.raises(SystemExit, match=r"there is nothing to measure: set --trainer.limit_val_batches"):
        main(["validate", str(run), "--trainer.limit_val_batches", "0"])
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_checkpoints_metrics_are_logged_at_its_step(config: Path, tmp_path: Path) -> None:
    folder, known = tmp_path / "run", set[int]()
    every = ["--checkpoint.every_n_train_steps", str(STEPS // 2), "--checkpoint.save_top_k", "-1"]
    main(["fit", "-c", str(config), "--run", str(folder), *every])
    known.update(read_curves(folder)["val/web/web_caption/cross_entropy"].steps)
    for step in (STEPS // 2, STEPS):
        main(["validate", str(folder / "checkpoints" / f"{step:08d}.ckpt")])
        found = set(read_curves(folder)["val/web/web_caption/cross_entropy"].steps)
        assert found - known == {step}
        known |= found


def test_validate_leaves_the_runs_configuration_as_it_was(run: Path) -> None:
    before = (run / "config.yaml").read_text()
    main(["validate", str(run), "--data.batch_size", "3"])
    assert (run / "config.yaml").read_text() == before


def test_validate_without_a_checkpoint_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["validate", "-c", str(config)])
    assert "no checkpoint" in capsys.readouterr().err


def test_checkpoint_without_configuration_asks_for_one(run: Path) -> None:
    file = find_checkpoint(run)
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["config"]
    torch.save(checkpoint, file)
    with pytest.raises(SystemExit, match="carries no configuration"):
        main(["validate", str(file)])


def test_run_goes_on_from_its_directory_alone(run: Path) -> None:
    main(["fit", "--ckpt_path", str(run), "--stages.pretrain_steps", str(STEPS + 2)])
    assert load(run)["global_step"] == STEPS + 2


def test_last_is_the_newest_run(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.move(run, tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    main(["fit", "--ckpt_path", "last", "--stages.pretrain_steps", str(STEPS + 1)])
    assert load(tmp_path / "runs" / "a")["global_step"] == STEPS + 1


def test_last_is_the_run_that_saved_last_whatever_the_dates_of_its_files(
    config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.move(run, tmp_path / "runs" / "older")
    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", str(config), "--run", "runs/newer"])
    for place, name in enumerate(["older", "newer"]):
        for file in Path("runs", name, "checkpoints").iterdir():
            os.utime(file, (2e9 - place, 2e9 - place), follow_symlinks=False)
    assert last_run() == Path("runs/newer")


def test_flags_win_over_the_configuration_in_the_checkpoint(run: Path) -> None:
    main(["fit", "--ckpt_path", str(run), "--stages.pretrain_steps", "9", "--trainer.max_steps", str(STEPS + 3)])
    assert load(run)["global_step"] == STEPS + 3


def test_last_steps_are_saved_though_no_interval_ends_there(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["fit", "-c", str(config), "--run", str(run), "--checkpoint.every_n_train_steps", "3"])
    assert load(run)["global_step"] == STEPS


@pytest.mark.slow
def test_run_that_was_interrupted_ends_as_if_it_had_not_been(config: Path, tmp_path: Path) -> None:
    run, whole, steps = tmp_path / "interrupted", tmp_path / "whole", 20
    flags = ["--stages.pretrain_steps", str(steps)]
    often = ["--checkpoint.every_n_train_steps", "2"]
    command = [sys.executable, "-m", "pi05_lightning", "fit", "-c", str(config), "--run", str(run), *flags, *often]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (run / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert f"Go on with: pi05 fit --ckpt_path {run}" in process.communicate()[1]

    main(["fit", "--ckpt_path", str(run)])
    main(["fit", "-c", str(config), "--run", str(whole), *flags])
    ended, expected = load(run), load(whole)
    assert ended["global_step"] == expected["global_step"] == steps
    assert all(torch.equal(ended["state_dict"][name], value) for name, value in expected["state_dict"].items())
