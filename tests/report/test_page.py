"""`pi05 report`: all that a run's directory holds is on the page, and nothing has to be loaded from elsewhere."""

import re
from pathlib import Path

import pytest

from pi05_lightning.cli.report import report
from pi05_lightning.evaluation.report.page import poster
from pi05_lightning.evaluation.report.plots import switch_steps
from pi05_lightning.evaluation.report.run import Curve, read_curves, read_run
from pi05_lightning.evaluation.statistics import ALL, rates

from .conftest import SUCCESS, SWITCH


@pytest.fixture
def page(run: Path) -> str:
    return report(run).read_text(encoding="utf-8")


def test_page_refers_to_no_other_file(page: str) -> None:
    addresses = re.findall(r'(?:src|href|poster)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_page_shows_success_of_every_mode_and_task(page: str) -> None:
    for by_task in SUCCESS.values():
        for task, (successes, trials) in by_task.items():
            assert task in page
            assert f"{successes} / {trials}" in page


def test_page_shows_every_metric(page: str) -> None:
    row = re.search(r"<tr><td>robot/qa</td>(.*?)</tr>", page.partition('id="metrics"')[2])
    assert row is not None
    assert "<td>0.875</td>" in row[1]


def test_value_that_is_no_number_says_so(page: str) -> None:
    row = re.search(r"<tr><td>robot/qa</td>(.*?)</tr>", page.partition('id="metrics"')[2])
    assert row is not None
    assert "<td>nan</td>" in row[1]


def test_modality_without_samples_is_named_and_has_no_zero(page: str) -> None:
    assert "No validation samples: web_caption." in page
    row = re.search(r"<tr><td>web_caption</td>(.*?)</tr>", page)
    assert row is not None
    assert set(re.findall(r"<td>(.*?)</td>", row[1])) == {"0", "–"}


def test_page_says_what_was_trained(page: str) -> None:
    for fact in ("0123456789ab", "pi05 fit -c mine.yaml", "2 M", "torch 2.11.0", "<td>90</td>"):
        assert fact in page


def test_page_shows_the_worst_examples(page: str) -> None:
    assert page.partition('id="worst"')[2].count('alt="robot/qa, sample 4"') == 1


def test_glance_has_a_bar_for_every_task_and_measured_row(page: str) -> None:
    glance = page.partition('id="glance"')[2].partition("</table>")[0]
    assert glance.count("<svg") == 4  # two tasks, actions, questions


def test_page_of_a_run_without_any_measurement_can_be_made(run: Path) -> None:
    for file in ("metrics.json", "rollout/rollout.json", "validation/examples.json", "provenance.json"):
        (run / file).unlink()
    assert "Nothing was measured yet" in report(run).read_text(encoding="utf-8")


def test_page_plays_the_videos(page: str) -> None:
    assert page.count('src="data:video/mp4;base64,') == 1


def test_page_carries_the_configuration(page: str) -> None:
    assert "seed_everything: 3" in page


def test_page_of_a_run_that_was_only_trained_says_what_is_missing(run: Path) -> None:
    (run / "metrics.json").unlink()
    (run / "rollout" / "rollout.json").unlink()
    page = report(run).read_text(encoding="utf-8")
    assert f"pi05 validate {run}" in page
    assert f"pi05 rollout {run}" in page


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run's directory"):
        report(tmp_path)


def test_poster_is_the_videos_last_frame(run: Path) -> None:
    (video,) = read_run(run).videos
    assert poster(video).startswith("data:image/png;base64,")


def test_curves_hold_every_logged_step(run: Path) -> None:
    curve = read_curves(run)["loss/total"]
    assert curve.steps == list(range(10))
    assert curve.values == pytest.approx([1 / (step + 1) for step in range(10)])


def test_stage_switch_is_found_in_the_curves(run: Path) -> None:
    assert switch_steps(read_curves(run)) == [SWITCH]


def test_run_of_one_stage_has_no_switch() -> None:
    assert switch_steps({"stage": Curve([0], [1.0])}) == []


def test_overall_success_counts_all_tasks() -> None:
    row = rates({"policy": {"a": (9, 10), "b": (7, 10)}})["policy"][ALL]
    assert (row.successes, row.trials, row.value) == (16, 20, 0.8)
    assert row.low < 0.8 < row.high
