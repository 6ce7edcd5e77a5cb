"""Every logger of the documentation, as its line of YAML says, in one run without a network."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi05_lightning.cli.main import main
from pi05_lightning.training.trackio import TrackioLogger

from .conftest import STEPS

wandb = pytest.importorskip("wandb", reason="needs the extra loggers")
LOSS = "loss/pretrain/text"
GUIDE = Path(__file__).parents[2] / "docs" / "evaluate.md"


def documented() -> dict[str, Any]:
    """What the guide says of each logger: its name in the table, and its line."""
    rows = re.findall(r"^\| (\w[\w& ]*) \| `logger: (\{.*\})` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: yaml.safe_load(line) for name, line in rows}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The working directory of a run of the debug model with all of them."""
    here = tmp_path_factory.mktemp("logged")
    trainer = {"log_every_n_steps": 1, "logger": list(documented().values())}
    (here / "loggers.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("TRACKIO_DIR", str(here / "trackio"))
        main(["fit", "-c", str(config), "-c", "loggers.yaml", "--run", "runs/mine"])
    wandb.finish()  # as at the process's end
    return here


def losses(logged: Path) -> np.ndarray:
    """Of the steps, as TensorBoard has them."""
    events = EventAccumulator(str(logged / "runs/tensorboard/version_0"))
    events.Reload()
    found = events.Scalars(LOSS)
    assert [event.step for event in found] == list(range(STEPS))
    return np.array([event.value for event in found])


def test_guide_has_a_line_for_each() -> None:
    assert list(documented()) == ["TensorBoard", "CSV", "Weights & Biases", "MLflow", "Trackio"]


def test_csv_has_the_losses(logged: Path) -> None:
    with (logged / "runs/csv/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(LOSS)]
    np.testing.assert_allclose([float(row[LOSS]) for row in rows], losses(logged), rtol=1e-6)


def test_weights_and_biases_has_the_losses_offline(logged: Path) -> None:
    (run,) = (logged / "runs/wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # a process of its own writes it
    while run.read_bytes().count(LOSS.encode()) < STEPS:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_mlflow_has_the_losses(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{logged}/runs/mlflow")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, LOSS)
    np.testing.assert_allclose([metric.value for metric in history], losses(logged), rtol=1e-6)


def test_trackios_run_goes_on_under_the_name_that_was_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio

    begun: list[str | None] = []

    def init(project: str, name: str | None, **_: Any) -> SimpleNamespace:
        begun.append(name)
        return SimpleNamespace(name=name or "made-up", finish=lambda: None)

    monkeypatch.setattr(trackio, "init", init)
    logger = TrackioLogger()
    for _ in range(2):  # as a validation of the same trainer comes after training
        assert logger.experiment is logger.experiment
        assert logger.version == "made-up"
        logger.finalize("success")
    assert begun == [None, "made-up"]


def test_trackio_has_the_losses(logged: Path) -> None:
    (database,) = (logged / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    found = {step: metrics[LOSS] for step, text in rows if LOSS in (metrics := json.loads(text))}
    assert list(found) == list(range(STEPS))
    np.testing.assert_allclose(list(found.values()), losses(logged), rtol=1e-6)
