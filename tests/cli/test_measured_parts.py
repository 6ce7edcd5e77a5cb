"""`pi05 test` and `pi05 validate`: each measures the part of the data that is declared for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi05_lightning.cli.main import main
from pi05_lightning.weights.locate import locate

from .conftest import STEPS

ROWS = {"train": 10, "validation": 6, "test": 4}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def parts(captions: Path, tmp_path: Path) -> Path:
    """The captions, as files for training, validation and test."""
    table, start = pq.read_table(captions), 0
    (tmp_path / "parts").mkdir()
    for name, rows in ROWS.items():
        pq.write_table(table.slice(start, rows), tmp_path / "parts" / f"{name}.parquet")
        start += rows
    return tmp_path / "parts"


class Forgetful(Callback):
    """Takes the hash away that was taken before, as for a trainer of a user's own."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.restored_hash = None


class TrainsOn(Callback):
    """Does what a run that trains does, between the hash of a checkpoint's weights and their reading: it saves.

    weights: what a name in `checkpoints` stands for then; None removes the file that it stands for.
    """

    def __init__(self, last: str, weights: str | None = None) -> None:
        self.last, self.weights = Path(last), weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        (self.last.resolve() if self.weights is None else self.last).unlink()
        if self.weights is not None:
            self.last.symlink_to(self.weights)


def training_on(run: Path, **arguments: str) -> list[str]:
    """The arguments that measure what `last.ckpt` is, while the run trains on."""
    last = run / "checkpoints" / "last.ckpt"
    callback = {"class_path": f"{__name__}.TrainsOn", "init_args": {"last": str(last), **arguments}}
    return [str(last), "--trainer.callbacks", json.dumps([callback])]


def measure(command: str, run: Path, data: Path) -> None:
    main([command, str(run), "--data.sources.web.init_args.path", str(data)])


def test_each_command_measures_its_own_part(run: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure("validate", run, parts)
    validation = (run / "metrics.json").read_text()
    measured = json.loads((run / "measured.json").read_text())
    assert measured["sha256"] == locate(run).content_hash()
    assert measured["paths"]["web"] == str(parts)
    assert measured["options"]["model.accuracy_threshold"] == 0.1
    assert measured["options"].keys() >= {"model.num_steps", "data.val_samples", "trainer.limit_val_batches"}
    shown = sorted((run / "validation").iterdir())
    measure("test", run, parts)
    assert (run / "metrics.json").read_text() == validation  # what the report shows as validation
    assert sorted((run / "validation").iterdir()) == shown
    assert json.loads(validation)["web/web_caption"]["samples"] == ROWS["validation"]
    assert json.loads((run / "test_metrics.json").read_text())["web/web_caption"]["samples"] == ROWS["test"]
    assert "\ntest" in capsys.readouterr().out
    events = EventAccumulator(str(run)).Reload()
    assert events.Scalars("val/web/web_caption/samples")[-1].step == STEPS  # the checkpoint's
    assert [event.step for event in events.Scalars("test/web/web_caption/samples")] == [STEPS]


def test_hash_is_of_the_weights_that_were_measured_though_there_is_an_average(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["fit", "-c", str(config), "--run", str(run), "--ema.decay", "0.9", "--trainer.max_steps", "1"])
    for options in ([], ["--trainer.callbacks", f"[{{class_path: {__name__}.Forgetful}}]"]):
        main(["validate", str(run), "--ema.validate", "false", *options])
        found = json.loads((run / "measured.json").read_text())["sha256"]
        assert found == locate(run, averaged=False).content_hash()
        assert found != locate(run).content_hash()


def test_a_run_that_trains_on_is_measured_by_the_weights_whose_hash_is_told(run: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    later = {name: tensor + 1 for name, tensor in content["state_dict"].items()}
    torch.save(content | {"global_step": STEPS + 1, "state_dict": later}, run / "checkpoints" / "later.ckpt")
    sha256 = locate(last).content_hash()
    main(["validate", *training_on(run, weights="later.ckpt")])
    measured = json.loads((run / "measured.json").read_text())
    assert last.readlink() == Path("later.ckpt")
    assert (measured["sha256"], measured["step"]) == (sha256, STEPS)
    assert locate(measured["checkpoint"]).content_hash() == sha256


def test_a_checkpoint_that_a_run_replaces_before_it_is_read_is_said_to_be_replaced(run: Path) -> None:
    with pytest.raises(SystemExit, match=r"\.ckpt is not there: where its run trains, it has replaced it"):
        main(["validate", *training_on(run)])


def test_data_without_a_test_part_is_refused(run: Path) -> None:
    with pytest.raises(SystemExit, match="none of web declares a test part"):
        main(["test", str(run)])


def test_sources_without_a_test_part_are_named_and_the_others_measured(
    run: Path, parts: Path, captions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    source = config["data"]["sources"]["web"]
    declared = {**source, "init_args": {**source["init_args"], "path": str(parts)}}
    config["data"]["sources"] = {"web": declared, "more": source}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", str(run), "--run", str(run)])
    assert [m for m in caplog.messages if "no test part" in m] == [
        "data.sources: no test part is declared in more, so nothing of that is tested on"
    ]
    measured = json.loads((run / "test_metrics.json").read_text())
    assert measured["web/web_caption"]["samples"] == ROWS["test"]
    assert measured["more/web_caption"]["samples"] == 0
