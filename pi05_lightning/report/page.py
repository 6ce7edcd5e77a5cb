"""`pi05 report`: a run on one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import mimetypes
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from pi05_lightning import __version__
from pi05_lightning.report.plots import MODE_LABELS, curve_panels, success_bars, switch_step
from pi05_lightning.report.run import Run, Success, read_json, read_run
from pi05_lightning.report.statistics import wilson_interval


def report(run: Path, out: Path | None = None, summary: Path | None = None) -> Path:
    """Write a page with what was trained, its curves, its metrics, its success in the simulator and its videos.

    Args:
        run: a run's directory, as `pi05 fit` writes it.
        out: the page; by default report.html in the run's directory.
        summary: summary.json of `pi05 demo`, for the seconds that each part took.

    Raises ValueError when `run` is not a run's directory.
    """
    out = out or run / "report.html"
    page = render(read_run(run), read_json(summary).get("seconds", {}) if summary else {})
    out.write_text(page, encoding="utf-8")
    print(f"page: {out}")
    return out


def render(run: Run, seconds: dict[str, float]) -> str:
    """The page's HTML, with every figure, image and video inside it."""
    environment = Environment(
        loader=PackageLoader("pi05_lightning.report", ""), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(data_uri=data_uri, svg_uri=svg_uri, number=number, caption=caption, poster=poster)
    switch = switch_step(run.curves)
    shown = {
        tag: curve for tag, curve in run.curves.items() if tag not in ("stage", "epoch") and not tag.startswith("val/")
    }
    return environment.get_template("page.html.j2").render(
        run=run,
        facts=facts(run, switch),
        seconds=seconds,
        overall=overall(run.success),
        bars=success_bars(run.success) if run.success else None,
        labels=MODE_LABELS,
        curves=curve_panels(shown, switch) if shown else None,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
    )


def facts(run: Run, switch: int | None) -> dict[str, Any]:
    """What was trained, in a few words each."""
    config = yaml.safe_load(run.config)
    last = max((curve.steps[-1] for curve in run.curves.values() if curve.steps), default=None)
    found = {
        "run": str(run.folder),
        "seed": config.get("seed_everything"),
        "last logged step": last,
        "second stage from step": switch,
        "data": ", ".join(config.get("data", {}).get("sources", {})),
        "batch size": config.get("data", {}).get("batch_size"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def overall(success: Success) -> dict[str, dict[str, float]]:
    """mode -> successes, trials, rate and Wilson interval over all tasks."""
    table = {}
    for mode, by_task in success.items():
        successes, trials = (sum(column) for column in zip(*by_task.values(), strict=True))
        low, high = wilson_interval(successes, trials)
        table[mode] = {"successes": successes, "trials": trials, "rate": successes / trials, "low": low, "high": high}
    return table


# --- filters of the template


def data_uri(file: Path) -> str:
    """The file itself as an address, so that the page needs no other file."""
    kind = mimetypes.guess_type(file.name)[0]
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def poster(video: Path) -> str:
    """A video's last frame, as the address of a PNG: what is seen before it plays, and in print."""
    with av.open(str(video)) as container:
        *_, last = container.decode(video=0)
    buffer = io.BytesIO()
    last.to_image().save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def svg_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def number(value: float | None) -> str:
    if value is None:
        return "not a number"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def caption(file: Path) -> str:
    return file.stem.replace("_", " ")
