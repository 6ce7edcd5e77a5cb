"""A run on one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import av
from jinja2 import Environment, PackageLoader, StrictUndefined

from pi05_lightning import __version__
from pi05_lightning.evaluation.report import plots
from pi05_lightning.evaluation.report.metrics import QUESTIONS, is_empty, number, ordered, sections
from pi05_lightning.evaluation.report.run import EXAMPLES, Run, is_of_training
from pi05_lightning.evaluation.report.tables import shown_option
from pi05_lightning.evaluation.statistics import ALL, rates

HEADLINES = (
    {"action_accuracy": "action values within the threshold"},
    {"exact_match": "words exactly right", "box_iou": "box IoU"},
    {"token_accuracy": "tokens right"},
)
"""metric -> what it says: those that a row of the table has of the first of these are its headlines."""


@dataclass(frozen=True)
class Glance:
    """A share of what could be right; None where it is no number."""

    name: str
    label: str
    value: float | None
    interval: tuple[float, float] | None = None


def templates(package: str) -> Environment:
    """Those of HTML in the folder of a package."""
    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: Run, seconds: dict[str, float]) -> str:
    """The page's HTML, with every figure, image and video inside it."""
    environment = templates("pi05_lightning.evaluation.report")
    environment.filters.update(
        data_uri=data_uri,
        svg_uri=svg_uri,
        number=number,
        film_caption=film_caption,
        mode_label=partial(plots.mode_label, acting=run.acting),
        percent=percent,
    )
    switches = plots.switch_steps(run.curves)
    posters = {film: poster(film) for film in run.videos}
    return environment.get_template("page.html.j2").render(
        run=run,
        films={film: first for film, first in posters.items() if first},
        damaged=[film.name for film, first in posters.items() if not first],
        facts=facts(run, switches),
        seconds=seconds,
        brief=brief(run, switches),
        glance=glance(run),
        overall={mode: by_task[ALL] for mode, by_task in rates(run.success).items()},
        bars=plots.success_bars(run.success, run.acting) if run.success else None,
        jumps=plots.jump_bars(run.rollout["jumps"], run.acting) if run.rollout.get("jumps") else None,
        acting=acting_rows(run.acting),
        protocol=protocol(run),
        latency=run.rollout.get("milliseconds", {}),
        failures=failure_rows(run.rollout.get("failures", {})),
        sections={
            title: (section.columns, {name: run.metrics[name] for name in section.rows})
            for title, section in sections(run.metrics).items()
        },
        question_columns=QUESTIONS,
        threshold=run.measured.get("options", {}).get("model.accuracy_threshold")
        or run.config.get("model", {}).get("accuracy_threshold", 0.1),
        otherwise=measured_otherwise(run),
        empty=[name for name in ordered(run.metrics) if is_empty(run.metrics[name])],
        errors={
            name: plots.as_svg(plots.draw_horizon(values))
            for name, values in run.metrics.items()
            if "action_mae/step_00" in values
        },
        curves=plots.topic_panels(run.curves, switches),
        examples={name: run.examples[name] for name in ordered(run.examples)},
        folder=(run.folder / EXAMPLES).parent,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
    )


def facts(run: Run, switches: Sequence[int]) -> dict[str, Any]:
    """What was trained, in a few words each."""
    source = run.provenance
    trained = (curve for tag, curve in run.curves.items() if is_of_training(tag))
    last = max((curve.steps[-1] for curve in trained if curve.steps), default=None)
    parameters = source.get("parameters")
    commit = source.get("commit")
    begun = source.get("from step")
    found = {
        "run": str(run.folder),
        "trained": source.get("started"),
        "resumed": f"time, commit, versions, hardware and command are of the last start, from step {begun}"
        if begun
        else None,
        "commit": commit[:12] + ("+" if commit.endswith("+") else "") if commit else None,
        "versions": ", ".join(f"{name} {version}" for name, version in source.get("versions", {}).items()),
        "seed": run.config.get("seed_everything"),
        "parameters": f"{parameters / 1e6:.4g} M" if parameters else None,
        "hardware": source.get("hardware"),
        "last logged step": last,
        "stage changes at step": ", ".join(map(str, switches)),
        "batch size": run.config.get("data", {}).get("batch_size"),
        "command": source.get("command"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def brief(run: Run, switches: Sequence[int]) -> list[str]:
    """One line: which steps, on which data, from which commit."""
    found = facts(run, switches)
    sources = run.config.get("data", {}).get("sources", {})
    # not every step is logged, and the weights that were measured may be of a later one
    steps = max(found.get("last logged step", -1) + 1, run.measured.get("step") or 0)
    since = f" from step {begun} on" if (begun := run.provenance.get("from step")) else ""
    parts = [
        f"{steps} steps" if steps else "",
        f"stage changes at step {found['stage changes at step']}" if switches else "",
        f"data: {', '.join(sources)}" if sources else "",
        f"seed {found['seed']}" if "seed" in found else "",
        f"commit {found['commit']}{since}" if "commit" in found else "",
        f"{found['parameters']} parameters" if "parameters" in found else "",
    ]
    return [part for part in parts if part]


def measured_otherwise(run: Run) -> dict[str, tuple[Any, Any]]:
    """Options and paths that the run's configuration has otherwise: as validation had them, and as it says."""
    sources = run.config.get("data", {}).get("sources", {})
    configured = {f"data.sources.{name}.path": of.get("init_args", {}).get("path") for name, of in sources.items()}
    measured = {f"data.sources.{name}.path": path for name, path in run.measured.get("paths", {}).items()}
    for key, value in run.measured.get("options", {}).items():
        group, _, name = key.partition(".")
        own = run.config.get(group, {}).get(name, value)
        configured[key] = 1.0 if own is None and name.startswith("limit_") else own  # the trainer's default: all
        measured[key] = value
    # by their texts: 1 is a batch, and 1.0 all of them
    return {
        key: (value, configured.get(key)) for key, value in measured.items() if f"{value}" != f"{configured.get(key)}"
    }


def protocol(run: Run) -> dict[str, str]:
    """How success was measured, as far as the rollout says: simulator, initial states, time limit, weights, noise."""
    result = run.rollout
    trials = sorted({counts[1] for by_task in run.success.values() for counts in by_task.values()})
    limits: dict[float, list[str]] = {}
    for task, seconds in result.get("max_seconds", {}).items():
        limits.setdefault(seconds, []).append(task)
    actings = run.acting.values()
    found = {
        "simulator": result.get("env", "").removesuffix("()"),
        "initial states": f"{' or '.join(map(str, trials))} per task" if trials else None,
        "seed": result.get("seed"),
        "time limit": "; ".join(
            f"{s:g} s" + (f" ({', '.join(t)})" if len(limits) > 1 else "") for s, t in limits.items()
        ),
        "noise": _of_all(f"× {options.get('noise_scale'):g}" for options in actings),
        "execution horizon": _of_all(f"{options.get('execution_horizon')} of a chunk's actions" for options in actings),
        "dtype": result.get("dtype"),
        "delays": ", ".join(map(str, result.get("delays", []))),
        "checkpoint": result.get("weights") or result.get("checkpoint"),
        "SHA-256": result.get("sha256"),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _of_all(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def failure_rows(failures: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[tuple[str, str, list[int]]]:
    """Task, reason, and how many episodes of every mode ended so."""
    rows = dict.fromkeys((task, reason) for by_task in failures.values() for task, r in by_task.items() for reason in r)
    counted = [
        (task, reason, [by_task.get(task, {}).get(reason, 0) for by_task in failures.values()]) for task, reason in rows
    ]
    return sorted(counted)


def acting_rows(acting: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """option -> its value in every mode of the rollout."""
    names = dict.fromkeys(name for options in acting.values() for name in options)
    return {name: [shown_option(options.get(name)) for options in acting.values()] for name in names}


def glance(run: Run) -> list[Glance]:
    """Numbers in [0, 1] of every task and row of the metric table: what is learned, and what is not."""
    rows = []
    for mode, by_task in list(rates(run.success).items())[:1]:  # the policy's
        label = f"success, {plots.mode_label(mode, run.acting)}"
        rows = [Glance(task, label, r.value, (r.low, r.high)) for task, r in by_task.items() if task != ALL]
    for name in ordered(run.metrics):
        values = run.metrics[name]
        shown = next((labels for labels in HEADLINES if not values.keys().isdisjoint(labels)), {})
        rows += [Glance(name, label, values[metric]) for metric, label in shown.items() if metric in values]
    return rows


# --- filters of the template


def data_uri(file: Path) -> str:
    """The file itself as an address, so that the page needs no other file."""
    kind = mimetypes.guess_type(file.name)[0]
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def poster(video: Path) -> str | None:
    """A video's last frame, as the address of a PNG: what is seen before it plays, and in print.

    None where it is damaged.
    """
    try:
        with av.open(str(video.absolute())) as container:
            *_, last = container.decode(video=0)
    except (av.FFmpegError, ValueError, IndexError):  # no video, no frame, no stream
        return None
    buffer = io.BytesIO()
    last.to_image().save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def svg_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def percent(value: float | None) -> str:
    return number(value) if value is None else f"{100 * value:.0f} %"


def film_caption(file: Path, run: Run) -> str:
    """What a film shows and how its episode ended; of older rollouts, which do not say, its name."""
    if file.name not in run.films:
        return file.stem.replace("_", " ")
    film = run.films[file.name]
    number = f"{film['number']} " if "number" in film else ""  # files of before it was written have none
    state = f"initial state {number}(seed {film['seed']})"
    parts = (plots.mode_label(film["mode"], run.acting), film["task"], state)
    return f"{' · '.join(parts)}: {film['outcome']}"
