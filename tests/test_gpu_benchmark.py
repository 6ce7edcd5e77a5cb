"""`python -m benchmarks.gpu` where there is no GPU: what it says, what it leaves, and parts of it at debug size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PARTS, Place
from benchmarks.gpu_figures import published_peak

QUICK = Place(quick=True)


@pytest.mark.slow
def test_without_a_gpu_the_benchmark_says_so_and_is_no_failure() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout


def test_parts_that_are_measured_or_do_not_fit_into_the_time_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.json"
    parts = {"ceilings": [{"name": "copy", "value": 3.0, "unit": "TB/s"}]}
    results.write_text(json.dumps({"CPU": {"parts": parts}, "another": {"parts": parts | {"train-nf4": []}}}))
    words = ["--quick", "--minutes", "0", "--json", str(results), "--only", "ceilings", "train-nf4", "train-sharded"]
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    said = capsys.readouterr().out
    assert "ceilings: measured before" in said
    assert "| copy | 3 TB/s |" in said
    assert "go on with --only train-nf4 train-sharded\n" in said


def test_what_is_left_when_measuring_again_is_named_without_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps({"CPU": {"parts": {"ceilings": []}}}))
    words = ["--quick", "--again", "--minutes", "0", "--json", str(results), "--only", "ceilings", "train-nf4"]
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert "go on with --again --only ceilings train-nf4\n" in capsys.readouterr().out


def test_quick_figures_neither_come_from_the_kept_results_nor_get_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "gpu.json"
    kept.write_text(before := json.dumps({"CPU": {"parts": {"ceilings": []}}}))
    monkeypatch.setattr(gpu, "RESULTS", kept)
    figures = [{"name": "copy", "value": 3.0, "unit": "TB/s"}]
    monkeypatch.setattr(gpu, "in_its_own_process", lambda *_: figures)
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--only", "ceilings"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert "| copy | 3 TB/s |" in capsys.readouterr().out
    assert kept.read_text() == before


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA B200", None),
    ],
)
def test_peak_of_a_device_is_the_published_one_or_none(name: str, peak: float | None) -> None:
    assert published_peak(name) == peak


def test_figures_stand_under_the_environment_that_they_were_measured_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.json"
    copy = [{"name": "copy", "value": 3.0, "unit": "TB/s"}]
    results.write_text(json.dumps({"CPU": {"parts": {"ceilings": copy}, "environment": "torch 1, 2026-01-01"}}))
    monkeypatch.setattr(gpu, "in_its_own_process", lambda *_: copy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for day, part in ((2, "train-nf4"), (3, "train-int8")):
        monkeypatch.setattr(gpu, "environment", lambda day=day: f"torch 2, 2026-01-0{day}")
        monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--json", str(results), "--only", "ceilings", part])
        gpu.main()
    said = capsys.readouterr().out.rpartition("\nCPU\n")[2].partition("\n\n")[0]
    assert said.splitlines() == [
        "torch 2, 2026-01-03",
        "kept from:",
        "torch 2, 2026-01-02",
        "train-nf4",
        "kept, the last of them from:",
        "torch 1, 2026-01-01",
        "ceilings",
    ]
    assert json.loads(results.read_text())["CPU"]["parts"]["ceilings"] == copy


@pytest.mark.slow_cases
@pytest.mark.parametrize("part", ["train-nf4", "train-int8", "train-8-bit"])
def test_a_part_runs_at_debug_size(part: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles a step of its optimizers for every shape
        figures = PARTS[part](QUICK)
    assert figures[0].unit == "samples/s"
    assert all(figure.value > 0 for figure in figures)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow  # two more processes
def test_the_sharded_part_runs_between_two_processes() -> None:
    figures = PARTS["train-sharded"](QUICK)
    assert "on each of 2 ranks" in figures[0].name
    assert all(figure.value > 0 for figure in figures)
