"""The metric table of a run: its rows and columns, for the terminal, the page, JSON and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pi05_lightning.files.local import replacing, write_json
from pi05_lightning.types import Modality, Subset

Metrics = dict[str, dict[str, float | None]]
"""source/modality -> metric -> value, None where it is no number"""

ROBOT_ACTIONS = (Modality.CONTINUOUS, Modality.FAST)
MODALITIES = (*ROBOT_ACTIONS, Modality.HL_SUBTASK, Modality.QA, Modality.WEB_CAPTION)
"""In the order of the table."""

SECTIONS: dict[str, dict[str, str]] = {
    "actions": {
        "samples": "n",
        "flow_loss": "flow loss",
        "action_mae": "MAE",
        "action_mae_real": "MAE real",
        "action_mse": "MSE",
        "action_mse_real": "MSE real",
        "action_accuracy": "right",
        "decode_success": "valid",
    },
    "tokens and text": {
        "samples": "n",
        "token_accuracy": "token acc.",
        "perplexity": "ppl",
        "exact_match": "exact match",
        "box_iou": "box IoU",
        "pointing_error": "point error",
    },
}
"""Part of the table -> metric of π0.5's heads -> heading; FAST tokens, which are actions and tokens, stand in both."""

OTHER_HEADS = "other heads"
"""The part of the table for metrics that π0.5's heads do not have."""

QUESTIONS = {metric: SECTIONS["tokens and text"][metric] for metric in ("samples", "exact_match", "box_iou")}
"""The same of the table by question."""


def ordered(names: Iterable[str]) -> list[str]:
    """The names of the rows: by modality, each modality's datasets before what they make together."""

    def place(name: str) -> tuple[int, bool, str]:
        subset = Subset.parse(name)
        return MODALITIES.index(subset.modality), not subset.source, name

    return sorted(names, key=place)


@dataclass(frozen=True)
class Section:
    """A part of the table. columns: metric -> heading;  rows: names, in order."""

    columns: dict[str, str]
    rows: list[str]


def sections(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, Section]:
    """The parts of the table that have rows; the last one is of the metrics of heads beside π0.5's own.

    What has no samples stands in both parts that it could be in.
    """
    known = {"cross_entropy"}.union(*SECTIONS.values())  # perplexity says what cross entropy does
    own = {name for values in metrics.values() for name in values if name not in known and "/" not in name}
    headings = SECTIONS | {OTHER_HEADS: {"samples": "n"} | {name: name.replace("_", " ") for name in sorted(own)}}
    found = {}
    for section, columns in headings.items():
        measured = set(columns) - {"samples"}
        empty = {
            name
            for name, values in metrics.items()
            if is_empty(values)
            and section in SECTIONS
            and (Subset.parse(name).modality in ROBOT_ACTIONS) == (section == "actions")
        }
        rows = [name for name in ordered(metrics) if name in empty or measured & set(metrics[name])]
        if rows:
            found[section] = Section(columns, rows)
    return found


def is_empty(values: Mapping[str, float | None]) -> bool:
    return values.get("samples") == 0


def number(value: float | None) -> str:
    """At most five characters for what is usual: 0.052, 8e-04, 12.3, 1234."""
    if value is None:
        return "nan"
    size = abs(value)
    if value == int(value) or size >= 100:
        return f"{value:.0f}" if size < 1e5 else f"{value:.0e}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}" if size >= 0.01 else f"{value:.0e}"


def write_metrics(results: Mapping[str, Mapping[str, float]], run: Path, name: str = "metrics") -> Metrics:
    """Write `name`.json and `name`.csv into a run, a row for each of the results in both; returns what the JSON holds.

    JSON has null, CSV has nan, for a value that is no number; what was not measured is in neither.
    """
    metrics: Metrics = {
        row: {metric: value if math.isfinite(value) else None for metric, value in results[row].items()}
        for row in ordered(results)
    }
    write_json(run / f"{name}.json", metrics)
    columns = list(dict.fromkeys(metric for values in metrics.values() for metric in values))
    with replacing(run / f"{name}.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["modality", "dataset", *columns])
        for row, values in metrics.items():
            cells = ["nan" if values.get(column, "") is None else values.get(column, "") for column in columns]
            subset = Subset.parse(row)
            table.writerow([str(subset.modality), subset.source or "all", *cells])
    return metrics
