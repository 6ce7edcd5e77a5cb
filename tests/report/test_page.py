"""`pi05 report`: all that a run's directory holds is on the page, and nothing has to be loaded from elsewhere."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
from torch.utils.tensorboard import SummaryWriter

from pi05_lightning.cli.report import report
from pi05_lightning.evaluation.report.page import poster
from pi05_lightning.evaluation.report.plots import by_panel, by_stage, readable, smoothed, success_bars, switch_steps
from pi05_lightning.evaluation.report.run import EXAMPLES, Curve, read_curves, read_run
from pi05_lightning.evaluation.statistics import ALL, rates
from pi05_lightning.training.callbacks.examples import ValidationExamples

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


def test_page_shows_how_each_question_is_answered(page: str) -> None:
    row = re.search(r"<tr><td>where is the red button\?</td>(.*?)</tr>", page.partition('id="metrics"')[2])
    assert row is not None
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["4", "0.250", "–"]


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
    assert glance.count("<svg") == 6  # two tasks, actions, words of two, boxes of one
    assert glance.count("box IoU") == 2
    assert glance.count("<td>nan</td>") == 1


def test_page_of_a_run_without_any_measurement_can_be_made(run: Path) -> None:
    for file in ("metrics.json", "rollout/rollout.json", "validation/examples.json", "provenance.json"):
        (run / file).unlink()
    assert "Nothing was measured yet" in report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "said"),
    [({"exact_match": None}, "words exactly right"), ({"pointing_error": 0.1}, "Nothing that was measured is a share")],
)
def test_what_was_measured_is_no_share_or_no_number_and_was_measured(
    run: Path, values: dict[str, float | None], said: str
) -> None:
    (run / "rollout" / "rollout.json").unlink()
    (run / "metrics.json").write_text(json.dumps({"robot/qa": {"samples": 8} | values}))
    page = report(run).read_text(encoding="utf-8")
    assert "Nothing was measured yet" not in page
    assert said in page


def test_page_plays_the_videos(page: str) -> None:
    assert page.count('src="data:video/mp4;base64,') == 1


def facts_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))


def test_page_says_how_success_was_measured(page: str) -> None:
    facts = facts_of(page)
    assert facts["simulator"] == "MetaWorld"
    assert facts["initial states"] == "10 per task"
    assert facts["time limit"] == "6 s (reach-v3); 8 s (door-open-v3)"
    assert facts["noise"] == "× 0.5"
    assert facts["execution horizon"] == "2 of a chunk&#39;s actions"
    assert (facts["checkpoint"], facts["SHA-256"]) == ("checkpoints/last.ckpt", "c0ffee" * 10)


def test_page_says_of_which_weights_the_metrics_are_and_whether_others_were_rolled_out(run: Path) -> None:
    measured = {"checkpoint": "checkpoints/last.ckpt", "sha256": "c0ffee" * 10, "step": 123}
    for sha256, others in (("c0ffee" * 10, False), ("beef" * 15, True)):
        (run / "measured.json").write_text(json.dumps(measured | {"sha256": sha256}))
        page = report(run).read_text(encoding="utf-8")
        assert "at step 123" in page.partition('id="metrics"')[2]
        assert "123 steps" in page.partition('id="glance"')[0]
        assert ("These are of other weights" in page) is others
    (run / "rollout" / "rollout.json").unlink()
    assert "These are of other weights" not in report(run).read_text(encoding="utf-8")


def change(file: Path, **values: object) -> None:
    """Of a JSON file that holds an object, some of its values."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def test_initial_states_are_said_to_be_held_out_where_that_is_known(run: Path) -> None:
    for known, held_out in (({}, False), ({"held_out": False}, False), ({"held_out": True}, True)):
        change(run / "rollout" / "rollout.json", **known)
        assert ("which no training episode started from" in report(run).read_text(encoding="utf-8")) is held_out


def test_of_a_resumed_run_it_is_said_which_start_is_shown(run: Path) -> None:
    for known, resumed in (({}, False), ({"from step": 0}, False), ({"from step": 1200}, True)):
        change(run / "provenance.json", **known)
        page = report(run).read_text(encoding="utf-8")
        assert ("are of the last start, from step 1200" in facts_of(page).get("resumed", "")) is resumed
        assert ("commit 0123456789ab from step 1200 on" in page.partition('id="glance"')[0]) is resumed


def test_metrics_are_described_with_the_options_that_they_were_measured_with(run: Path) -> None:
    assert "off by at most\n0.1 of that" in report(run).read_text(encoding="utf-8")
    sources = "sources: {robot: {init_args: {path: here}}}"
    (run / "config.yaml").write_text(f"data: {{{sources}, val_samples: 8}}\ntrainer: {{limit_val_batches: null}}\n")
    same = {"model.accuracy_threshold": 0.05, "data.val_samples": 8, "trainer.limit_val_batches": 1.0}
    of_none = dict.fromkeys(("checkpoint", "sha256", "step"))
    change(run / "measured.json", **of_none, options=same, paths={"robot": "here"})
    page = report(run).read_text(encoding="utf-8")
    assert "off by at most\n0.05 of that" in page
    assert "Measured otherwise" not in page
    change(run / "measured.json", options=same | {"trainer.limit_val_batches": 1}, paths={"robot": "there"})
    page = report(run).read_text(encoding="utf-8")
    assert "says: data.sources.robot.path there (here); trainer.limit_val_batches 1 (1.0)." in page


def test_an_example_whose_picture_is_missing_is_left_out(run: Path) -> None:
    (run / "validation" / "robot-qa-worst-0.png").unlink()
    page = report(run).read_text(encoding="utf-8")
    assert 'alt="robot/qa, sample 4"' not in page
    (shown,) = read_run(run).examples["robot/qa"]
    assert shown.file == "robot-qa-first-0.png"


def test_a_validation_that_is_interrupted_leaves_no_examples_of_other_pictures(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(example: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pi05_lightning.training.callbacks.examples.draw_example", interrupted)
    callback = ValidationExamples()
    callback.worse, callback.fixed = {"robot/qa": cast("Any", [None])}, {}
    with pytest.raises(KeyboardInterrupt):
        callback.write(run)
    assert read_run(run).examples == {}
    assert not (run / EXAMPLES).exists()


def test_bars_of_many_columns_are_told_apart() -> None:
    success = {f"mode {number}": {"reach": (1, 2)} for number in range(9)}
    assert "<pattern" not in success_bars(dict(list(success.items())[:7]), {})
    assert success_bars(success, {}).count("<pattern") == 2  # one for each colour that comes again


def test_page_says_how_long_it_took_and_why_episodes_failed(page: str) -> None:
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert {"36.5", "88.7", "3.8"} <= set(cells)
    place = cells.index("out of time")
    assert cells[place - 1 : place + 3] == ["door-open-v3", "out of time", "3", "·"]


def test_page_has_groups_of_tasks_and_successes_in_a_minute(page: str) -> None:
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    easy, mean = cells.index("easy"), cells.index("mean of these rates")
    assert cells[easy : easy + 3] == ["easy", "3 / 4", "0 / 4"]
    assert cells[mean : mean + 3] == ["mean of these rates", "0.50", "–"]
    minute = cells.index("successes in a simulated minute")
    assert cells[minute + 1 : minute + 3] == ["12.5", "–"]


def test_caption_of_a_film_says_how_it_ended(page: str, run: Path) -> None:
    assert "policy, subtask first · reach-v3 · initial state 7 (seed 2000007): out of time" in page
    older = json.loads((run / "rollout" / "rollout.json").read_text())
    for film in older["films"].values():
        del film["number"]
    (run / "rollout" / "rollout.json").write_text(json.dumps(older))
    assert "· initial state (seed 2000007): out of time" in report(run).read_text(encoding="utf-8")
    older["films"] = list(older["films"])
    del older["groups"], older["macro"], older["per_minute"]
    (run / "rollout" / "rollout.json").write_text(json.dumps(older))
    assert "<figcaption>policy-reach-v3-0</figcaption>" in report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("group", ["rollout/success_of", "rollout/success"], ids=["now", "older"])
@pytest.mark.parametrize("cost", [13.0, 130.0])
def test_success_over_all_tasks_stays_beside_that_of_each(group: str, cost: float) -> None:
    success, seconds = Curve([0, 10], [0.4, 0.8]), Curve([0, 10], [cost, cost])
    of_tasks = {f"{group}/{task}": success for task in ("reach-v3", "push-v3")}
    panels = by_panel({"rollout/success": success, "rollout/seconds": seconds} | of_tasks)
    assert {title: set(lines) for title, lines in panels.items()} == {
        "rollout/success": {"success", "reach-v3", "push-v3"},
        "rollout/seconds": {"seconds"},
    }


def test_a_policy_that_says_no_subtask_is_not_said_to(run: Path) -> None:
    file = run / "rollout" / "rollout.json"
    result = json.loads(file.read_text())
    result["acting"]["policy"]["hierarchical"] = False
    file.write_text(json.dumps(result))
    page = report(run).read_text(encoding="utf-8")
    assert "<th>policy</th>" in page
    assert "subtask first" not in page


def test_nothing_is_smoothed_over_the_beginning_of_a_stage() -> None:
    curve = Curve(list(range(0, 20, 2)), [1.0] * 5 + [0.0] * 5)
    first, second = by_stage("loss/total", curve, [10])
    assert (first.steps[-1], second.steps[0]) == (8, 10)
    assert (set(smoothed(first.values)), set(smoothed(second.values))) == ({1.0}, {0.0})
    assert by_stage("loss/total", curve, []) == [curve]
    assert by_stage("loss/total", curve, [0, 40]) == [curve]


def test_what_is_measured_at_the_end_of_a_stage_is_drawn_with_it() -> None:
    first, second = by_stage("rollout/success", Curve([5, 10, 15], [0.1, 0.2, 0.3]), [10])
    assert (first.steps, second.steps) == ([5, 10], [15])


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("decay_x1_x1", "with weight decay"),
        ("no_decay", "without weight decay"),
        ("no_decay_x1_x0.1", "without weight decay, × 1, 0.1 by stage"),
        ("decay_x1_x1e-05", "with weight decay, × 1, 1e-05 by stage"),
        ("throughput/tflops_per_second", "TFLOP/s"),
        ("mixture/robot", "mixture · robot"),
        ("hl_subtask", "hl subtask"),
    ],
)
def test_scalars_are_named_for_people(tag: str, name: str) -> None:
    assert readable(tag) == name


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


def test_damaged_films_are_left_out_and_named(run: Path) -> None:
    rollout = run / "rollout"
    whole = (rollout / "policy-reach-v3-0.mp4").read_bytes()
    damaged = {"empty.mp4": b"", "half.mp4": whole[: len(whole) // 2], "text.mp4": b"a film"}
    for name, content in damaged.items():
        (rollout / name).write_bytes(content)
    films = json.loads((rollout / "rollout.json").read_text())["films"]
    change(rollout / "rollout.json", films=films | dict.fromkeys(damaged, films["policy-reach-v3-0.mp4"]))
    page = report(run).read_text(encoding="utf-8")
    assert page.count('src="data:video/mp4;base64,') == 1
    assert "Left out, as they cannot be read: empty.mp4, half.mp4, text.mp4." in page


def test_poster_is_the_videos_last_frame(run: Path) -> None:
    (video,) = read_run(run).videos
    assert (poster(video) or "").startswith("data:image/png;base64,")


def test_curves_hold_every_logged_step(run: Path) -> None:
    curve = read_curves(run)["loss/total"]
    assert curve.steps == list(range(10))
    assert curve.values == pytest.approx([1 / (step + 1) for step in range(10)])


def test_curves_leave_out_what_a_later_start_took_back(run: Path) -> None:
    with SummaryWriter(str(run), filename_suffix=".before") as writer:
        for total in (3, 6, 9):
            writer.add_scalar("val/x", 1.0, total)
    with SummaryWriter(str(run), filename_suffix=".later") as writer:
        writer.add_scalar("stage", 1.0, 6)  # it goes on with the checkpoint of six steps
        writer.add_scalar("loss/total", 2.0, 7)
    curves = read_curves(run)
    assert curves["loss/total"].steps == [0, 1, 2, 3, 4, 5, 7]
    assert curves["loss/total"].values[-1] == 2
    assert curves["val/x"].steps == [3, 6]
    assert switch_steps(curves) == [SWITCH]


def test_stage_switch_is_found_in_the_curves(run: Path) -> None:
    assert switch_steps(read_curves(run)) == [SWITCH]


def test_run_of_one_stage_has_no_switch() -> None:
    assert switch_steps({"stage": Curve([0], [1.0])}) == []


def test_overall_success_counts_all_tasks() -> None:
    row = rates({"policy": {"a": (9, 10), "b": (7, 10)}})["policy"][ALL]
    assert (row.successes, row.trials, row.value) == (16, 20, 0.8)
    assert row.low < 0.8 < row.high
