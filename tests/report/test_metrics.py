"""The metric table, for the terminal and in files."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pi05_lightning.evaluation.report.metrics import number, ordered, sections, write_metrics
from pi05_lightning.evaluation.report.tables import markdown_table, metrics_tables, questions_table

RESULTS = {
    "web/qa": {"samples": 4, "exact_match": 0.5},
    "robot/qa": {"samples": 4, "exact_match": 0.25, "box_iou": float("nan")},
    "qa": {"samples": 8, "exact_match": 0.375},
    "robot/continuous_robot_actions": {"samples": 9, "action_mae": 0.125, "action_mae/dim_00": 0.125},
    "web_caption": {"samples": 0},
}


def printed(width: int) -> str:
    file = io.StringIO()
    metrics = {name: {k: None if v != v else v for k, v in values.items()} for name, values in RESULTS.items()}
    Console(file=file, width=width).print(*metrics_tables(metrics))
    return file.getvalue()


def test_rows_go_by_modality_and_end_with_what_its_datasets_make_together() -> None:
    assert ordered(RESULTS) == ["robot/continuous_robot_actions", "robot/qa", "web/qa", "qa", "web_caption"]


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_row_and_nothing_cut_off(width: int) -> None:
    table = printed(width)
    assert all(name in table for name in RESULTS)
    assert "…" not in table
    assert "valid" in table  # the last column


def test_metrics_of_heads_of_ones_own_have_a_part_of_the_table() -> None:
    metrics = {"robot/continuous_robot_actions": {"samples": 9, "action_mae": 0.1, "gripper_accuracy": 0.75}}
    assert [(title, section.rows) for title, section in sections(metrics).items()] == [
        ("actions", ["robot/continuous_robot_actions"]),
        ("other heads", ["robot/continuous_robot_actions"]),
    ]
    file = io.StringIO()
    Console(file=file, width=80).print(*metrics_tables(metrics))
    assert "gripper accuracy" in file.getvalue()
    assert "0.75" in file.getvalue()
    assert "other heads" not in printed(80)


def test_table_says_which_modality_has_no_samples() -> None:
    row = next(line for line in printed(80).splitlines() if line.strip().startswith("web_caption"))
    assert "none" in row
    assert "0" not in row


def test_questions_with_brackets_are_shown_as_they_were_asked() -> None:
    questions = ["<image> [INST] what is this? [/INST]", "point to the [red] cube"]
    file = io.StringIO()
    rows = {question: {"samples": 1.0} for question in questions}
    Console(file=file, width=200).print(questions_table("robot/qa [new]", rows))
    assert all(shown in file.getvalue() for shown in (*questions, "robot/qa [new]"))


def test_what_was_not_measured_is_not_zero() -> None:
    row = next(line for line in printed(80).splitlines() if line.strip().startswith("robot/continuous"))
    assert "–" in row


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    write_metrics(RESULTS, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["robot/qa"]["box_iou"] is None


def test_csv_has_a_row_per_modality_and_dataset_and_a_column_per_metric(tmp_path: Path) -> None:
    write_metrics(RESULTS, tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = {(row["modality"], row["dataset"]): row for row in csv.DictReader(file)}
    assert rows[("qa", "web")]["exact_match"] == "0.5"
    assert rows[("qa", "all")]["exact_match"] == "0.375"
    assert rows[("qa", "robot")]["box_iou"] == "nan"
    assert rows[("qa", "web")]["box_iou"] == ""
    assert rows[("continuous_robot_actions", "robot")]["action_mae/dim_00"] == "0.125"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.125, "0.125"), (1.0, "1"), (0.0004, "4e-04"), (12.34, "12.3"), (1234.5, "1234"), (None, "nan")],
)
def test_number_takes_five_characters(value: float | None, text: str) -> None:
    assert number(value) == text


def test_cells_of_a_markdown_table_may_have_bars_and_line_breaks() -> None:
    table = markdown_table(["name", "value"], [("a|b", 1), ("a\\|b", 2), ("one\ntwo", None)])
    assert table == "| name | value |\n|---|---|\n| a\\|b | 1 |\n| a\\|b | 2 |\n| one two | None |"
