"""What the card of a published policy says of its run: Markdown by heading, and the results that the Hub lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, hf_hub_url

from pi05_lightning.evaluation.report.metrics import number, sections
from pi05_lightning.evaluation.report.page import film_caption, measured_otherwise, protocol
from pi05_lightning.evaluation.report.run import ROLLOUT, Run
from pi05_lightning.evaluation.report.tables import markdown_table
from pi05_lightning.evaluation.statistics import ALL, rates
from pi05_lightning.weights.published import as_it_is

FILMS = "films"
RUN_CONFIG = "run.yaml"
"""The configuration of the run, in what is published."""
_FROM_HOME_OR_ABOVE = re.compile(r"(~([a-z_][\w.-]*)?|\.\.)/", re.IGNORECASE)
_CALL = re.compile(r"[\w.<>]+\(.*\)", re.DOTALL)
"""What a simulator with its options is written as."""
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def run_of_robot(run: Run, robot: str, others: set[str]) -> Run:
    """What a run measured of one of its robots.  others: sources that are other robots; means over all are left out."""
    if not others:
        return run
    acted = {acting.get("robot") for acting in run.acting.values()}
    if run.success and not acted <= {robot, None}:
        print(f"{ROLLOUT} is of the robot {', '.join(map(str, acted))}, so success and films are left out")
        run = replace(run, videos=[], rollout={})
    of_sources = {name: of for name, of in run.metrics.items() if "/" in name}
    return replace(run, metrics={name: of for name, of in of_sources.items() if name.partition("/")[0] not in others})


def published_config(run: Run) -> dict[str, Any]:
    """A run's configuration as `with_names_alone` has it, and of data that did not come from the Hub its name alone."""
    config = with_names_alone(run.config)
    for name, source in config.get("data", {}).get("sources", {}).items():
        options = source.get("init_args", {})
        if "path" in options:
            options["path"] = data_name(run, name, options["path"])
    return config


def data_name(run: Run, source: str, path: str) -> str:
    """What a source's data is called: the Hub's name, if the run took it from there, or the last part of its path."""
    return path if path == run.provenance.get("hub", {}).get("data", {}).get(source) else Path(path).name


def with_names_alone(value: Any) -> Any:
    """A configuration without what is of this machine or its user alone.

    Of paths that begin with `/`, `~` or `..` the last part is left, of addresses no user's name, password and query.
    So it is with what is quoted in a call, as the options of `MyEnv(scene='/home/me/x.xml')`.
    """
    if isinstance(value, dict):
        return {key: with_names_alone(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_names_alone(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[a-z][a-z0-9+.-]*:(//|/)\S*", value):
        scheme, _, rest = value.partition(":")
        place = rest.partition("?")[0]
        if scheme == "file" or not place.removeprefix("//").partition("/")[0]:  # of this machine
            return f"{scheme}:{Path(place).name}"
        host, slash, path = place.removeprefix("//").partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    if _CALL.fullmatch(value):
        return _QUOTED.sub(lambda found: f"{found[0][0]}{with_names_alone(found[0][1:-1])}{found[0][-1]}", value)
    is_place = Path(value).is_absolute() or _FROM_HOME_OR_ABOVE.match(value)
    return Path(value).name if is_place else value


def card_sections(run: Run, repo: str) -> dict[str, str]:
    """What a card says of a run, by heading."""
    found = {
        "### Data": data_section(run),
        "## Success in closed loop": success_section(run),
        "## Metrics on validation data": metrics_section(run),
        "## Films": films_section(run, repo),
    }
    return {heading: text for heading, text in found.items() if text}


def data_section(run: Run) -> str:
    samples, sources = run.provenance.get("samples", {}), run.config.get("data", {}).get("sources", {})
    paths = {name: str(source.get("init_args", {}).get("path", "")) for name, source in sources.items()}
    known = {name: data_name(run, name, path) for name, path in paths.items()}
    rows = [
        (name, known.get(name.partition("/")[0], ""), of.get("train", ""), of.get("val", ""))
        for name, of in samples.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in run.provenance.get("versions", {}).items())
    since = f" from step {step} on" if (step := run.provenance.get("from step")) else ""
    made = f"Made with {versions}{since}; [{RUN_CONFIG}]({RUN_CONFIG}) is the configuration.\n\n" if versions else ""
    heads = ("source and modality", "dataset", "samples to train on", "to validate on")
    return made + table_of_texts(heads, rows) if rows else made


def success_section(run: Run) -> str:
    """A row per task: successes of trials and the interval in every mode."""
    if not run.success:
        return ""
    found = rates(run.success)
    tasks = list(next(iter(found.values())))
    cells = [
        [f"{(r := by_task[task]).successes}/{r.trials} ({r.low:.2f}–{r.high:.2f})" for by_task in found.values()]
        for task in tasks
    ]
    states = ", on initial states not trained on" if run.rollout.get("held_out") else ""
    about = f"Episodes that succeeded, and the 95 % Wilson interval of the rate{states}.\n\n"
    counted = table_of_texts(("task", *found), [(task, *row) for task, row in zip(tasks, cells, strict=True)])
    how = [
        (name, Path(value).name if name == "checkpoint" else with_names_alone(value))
        for name, value in protocol(run).items()
    ]
    return f"{about}{counted}\n\nHow it was measured:\n\n{table_of_texts(('', ''), how)}"


def metrics_section(run: Run) -> str:
    parts = []
    for section in sections(run.metrics).values():
        used = [metric for metric in section.columns if any(metric in run.metrics[row] for row in section.rows)]
        cells = [
            (row, *(number(run.metrics[row][metric]) if metric in run.metrics[row] else "" for metric in used))
            for row in section.rows
        ]
        parts.append(table_of_texts(("modality", *(section.columns[metric] for metric in used)), cells))
    sources = {f"data.sources.{name}.path": name for name in run.config.get("data", {}).get("sources", {})}
    shown = {
        key: [data_name(run, sources[key], str(value)) if key in sources else with_names_alone(value) for value in both]
        for key, both in measured_otherwise(run).items()
    }
    otherwise = [(key, measured, own) for key, (measured, own) in shown.items() if measured != own]
    if parts and otherwise:
        parts.append(table_of_texts(("measured with other options", "in validation", f"in {RUN_CONFIG}"), otherwise))
    return "\n\n".join(parts)


def films_section(run: Run, repo: str) -> str:
    """Each with what it shows and how its episode ended."""
    return "\n\n".join(
        f'<video controls width="320" src="{hf_hub_url(repo, film.name, subfolder=FILMS)}"></video>\n\n'
        f"{as_it_is(film_caption(film, run))}"
        for film in run.videos
    )


def table_of_texts(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown that shows its cells as they are."""
    return markdown_table([*map(as_it_is, heads)], [[as_it_is(str(cell)) for cell in row] for row in rows])


def results_of(run: Run) -> list[EvalResult]:
    """Success in every mode of the policy over all tasks, as the Hub lists results."""
    return [
        EvalResult(
            task_type="robotics",
            dataset_type="simulation",
            dataset_name=f"{by_task[ALL].trials} {'held-out ' if run.rollout.get('held_out') else ''}initial states",
            metric_type="success_rate",
            metric_name=f"success ({mode})",
            metric_value=round(by_task[ALL].value, 4),
        )
        for mode, by_task in rates(run.success).items()
        if mode in run.acting or mode == "policy"
    ]
