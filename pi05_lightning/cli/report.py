"""`pi05 report`: a run on one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from pi05_lightning.evaluation.report.page import render
from pi05_lightning.evaluation.report.run import read_run
from pi05_lightning.files.local import check_writable, read_json, write_text


def report(run: Path, out: Path | None = None, summary: Path | None = None) -> Path:
    """Write a page with what was trained, its curves, its metrics, its success in the simulator and its videos.

    Args:
        run: a run's directory, as `pi05 fit` writes it.
        out: the page; by default report.html in the run's directory.
        summary: summary.json of `pi05 demo`, for the seconds that each part took.

    Raises ValueError when `run` is not a run's directory.
    """
    out = out or run / "report.html"
    if out.is_dir() or (out.exists() and out.suffix != ".html"):
        raise ValueError(f"out: {out} is there, and is no page: name a file that ends with .html")
    check_writable(out.parent, "--out")
    if summary is not None and not summary.is_file():
        raise ValueError(f"summary: there is no file {summary}")
    seconds = read_json(summary).get("seconds", {}) if summary else {}
    write_text(out, render(read_run(run), seconds))
    print(f"page: {out}")
    return out
