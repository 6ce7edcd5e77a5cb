"""Validation in real processes: one, and two that share the samples over gloo."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("validate.py")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(videos: Path, fast: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run's directory after validation on one and on two ranks."""
    found = {}
    for ranks in (1, 2):
        run = tmp_path_factory.mktemp(f"ranks{ranks}")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, str(SCRIPT), str(videos), str(fast), str(run)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = run
    return found


def results(run: Path, rank: int = 0) -> dict[str, dict[str, float]]:
    return json.loads((run / f"rank{rank}.json").read_text())


def test_two_ranks_measure_what_one_does(runs: dict[int, Path]) -> None:
    one, two = results(runs[1]), results(runs[2])
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_both_ranks_know_the_result_of_both(runs: dict[int, Path]) -> None:
    assert results(runs[2], 0) == results(runs[2], 1)


def test_ranks_have_one_table_of_what_all_of_them_asked(runs: dict[int, Path]) -> None:
    one, other = (json.loads((runs[2] / f"questions{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one["of every rank"] == {"samples": 2, "exact_match": 0.5}
    assert one["other questions"] == {"samples": 2, "exact_match": 1.0}


def test_no_sample_is_counted_twice(runs: dict[int, Path]) -> None:
    assert results(runs[2])["robot/continuous_robot_actions"]["samples"] == 7


def test_worst_example_is_that_of_all_ranks(runs: dict[int, Path]) -> None:
    kept = [json.loads((run / "validation" / "examples.json").read_text()) for run in runs.values()]
    one, two = ({name: [s["key"] for s in files if s["group"] == "worst"] for name, files in k.items()} for k in kept)
    assert one == two


def test_modality_without_samples_says_so_instead_of_zero(runs: dict[int, Path]) -> None:
    assert results(runs[1])["web_caption"] == {"samples": 0}


def test_csv_holds_the_rows_and_values_of_the_json(runs: dict[int, Path]) -> None:
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    with (runs[1] / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(metrics)
    for row in rows:
        name = row["modality"] if row["dataset"] == "all" else f"{row['dataset']}/{row['modality']}"
        written = {metric: float(value) for metric, value in row.items() if value and metric in metrics[name]}
        assert written == metrics[name]
