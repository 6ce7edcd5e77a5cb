"""Advantages and signs of whole datasets: a threshold per task, corrections always positive."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning.cli.value_fit import value_fit
from pi05_lightning.cli.value_label import histogram_section
from pi05_lightning.data.attempts import COLLECTED, Attempts
from pi05_lightning.data.labels import Labels
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.experience.calibration import calibration, calibration_plot, histograms
from pi05_lightning.experience.labelling import check_shares, judge, labels_path, labels_paths
from pi05_lightning.experience.rounds import AttemptSummary
from pi05_lightning.experience.value import AttemptDataset, datasets_of, longest_of
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.config import ModelConfig
from tests.experience.attempts import LENGTHS, recorded_attempts

LONGEST = {"close the drawer": 15, "open the drawer": 9}


@pytest.fixture
def dataset(pictures: Path, tmp_path: Path) -> AttemptDataset:
    return AttemptDataset(str(recorded_attempts(pictures, tmp_path / "tries")))


def test_longest_episode_is_that_of_all_datasets(dataset: AttemptDataset, pictures: Path) -> None:
    assert longest_of([dataset]) == LONGEST


def rewrite(dataset: AttemptDataset, name: str, values: pa.Array) -> AttemptDataset:
    """The dataset with other values in a column."""
    (path,) = Path(dataset.path, "data").glob("*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)
    return AttemptDataset(dataset.path)


def test_episode_that_goes_over_to_another_task_counts_for_both(dataset: AttemptDataset) -> None:
    tasks = np.repeat([0, 0, 0, 0, 0], LENGTHS)
    tasks[30:] = 1  # within the third episode, the longest one
    assert set(rewrite(dataset, "task_index", pa.array(tasks)).attempts.longest.values()) == {15}


def test_missing_intervention_is_no_intervention_of_the_policy(dataset: AttemptDataset) -> None:
    corrected = dataset.attempts.intervention.tolist()
    corrected[13] = None
    with pytest.raises(ValueError, match="intervention does not say whether anybody corrected episode 1, frame 1"):
        _ = rewrite(dataset, "intervention", pa.array(corrected, pa.bool_())).attempts


def test_failure_costs_something(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="c_fail is -5: it must be above 0"):
        value_fit(tmp_path / "value", policy=tmp_path, c_fail=-5)


def test_attempts_say_whether_there_are_corrections_and_successes_without(
    dataset: AttemptDataset, pictures: Path
) -> None:
    assert AttemptSummary.read(dataset.path) == AttemptSummary(
        dataset.path, corrected=True, successes=[0, 3, 4], collected=False
    )
    labels = Path(dataset.path, "labels.parquet")
    attempts = dataset.attempts
    signs = {"positive": np.zeros(len(attempts.episode), dtype=bool)}
    Labels(attempts.episode, attempts.frame, signs, {}).write(labels, dataset.files)
    assert AttemptSummary.read(dataset.path, labels).signs == ("negative",)
    Labels(attempts.episode, attempts.frame, {"positive": attempts.intervention}, {}).write(labels, dataset.files)
    assert AttemptSummary.read(dataset.path, labels).signs == ("negative",)  # corrections are no frames of the policy
    of_all = pq.read_table(path := next(Path(dataset.path, "data").glob("*/*.parquet")))
    never = pa.array([False] * len(of_all), pa.bool_())
    place = of_all.column_names.index("next.success")
    pq.write_table(of_all.set_column(place, "next.success", never), path)
    assert AttemptSummary.read(dataset.path) == AttemptSummary(
        dataset.path, corrected=True, successes=[], collected=False
    )
    place = of_all.column_names.index("intervention")
    pq.write_table(of_all.set_column(place, "intervention", never), path)
    assert AttemptSummary.read(dataset.path) == AttemptSummary(
        dataset.path, corrected=False, successes=[0, 1, 3, 4], collected=False
    )


def test_attempts_that_are_held_out_have_nothing_to_learn_from(dataset: AttemptDataset) -> None:
    attempts, labels = dataset.attempts, Path(dataset.path, "labels.parquet")
    first_alone = {"positive": attempts.episode == 0}
    Labels(attempts.episode, attempts.frame, first_alone, {}).write(labels, dataset.files)
    file = Path(dataset.path, "meta", "info.json")
    write_json(file, read_json(file) | {"splits": {"train": "2:5", "val": "0:2"}})
    found = AttemptSummary.read(dataset.path, labels)
    assert (found.signs, found.corrected, found.successes) == (("negative",), False, [3, 4])


def test_signs_are_by_task_and_corrections_positive_whatever_their_advantage(dataset: AttemptDataset) -> None:
    rng = np.random.default_rng(0)
    value = -rng.uniform(size=sum(LENGTHS))
    (judged,), thresholds = judge([dataset], [value], LONGEST, None, None, {"open the drawer": 0.5}, 0.25)
    attempts = dataset.attempts
    assert judged.positive[attempts.intervention].all()
    for task, share in (("close the drawer", 0.25), ("open the drawer", 0.5)):
        own = (attempts.task == task) & ~attempts.intervention
        np.testing.assert_array_equal(judged.positive[own], judged.advantage[own] > thresholds[task])
        assert judged.positive[own].mean() == pytest.approx(share, abs=1 / own.sum())
    np.testing.assert_allclose(judged.advantage, judged.returns - value)
    assert (judged.returns[attempts.episode == 2] == -1).all()


def test_later_rounds_take_the_value_after_n_steps(dataset: AttemptDataset) -> None:
    value = np.linspace(-0.6, -0.1, sum(LENGTHS))
    (judged,), _ = judge([dataset], [value], LONGEST, None, 4, {}, 0.3)
    assert judged.advantage[0] == pytest.approx(value[4] - 4 / 15 - value[0])
    assert judged.advantage[11] == pytest.approx(0 - value[11])


def test_value_that_learned_nothing_is_refused(dataset: AttemptDataset) -> None:
    returns = dataset.returns(LONGEST, None)
    with pytest.raises(ValueError, match="task 'close the drawer': all of its 38 advantages are 0"):
        judge([dataset], [returns], LONGEST, None, None, {}, 0.3)


@pytest.mark.parametrize(
    ("shares", "share"), [({}, 0.0), ({}, 1.5), ({"fly": 0.3}, 0.3), ({"open the drawer": 1.0}, 0.3)]
)
def test_shares_that_are_none_are_refused(shares: dict[str, float], share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        check_shares(share, shares, LONGEST)


def test_labels_go_beside_the_dataset_or_into_a_folder(dataset: AttemptDataset, tmp_path: Path) -> None:
    assert labels_path(dataset.files.root, None) == tmp_path / "tries.labels.parquet"
    assert labels_path(dataset.files.root, Path("out")) == Path("out", f"{tmp_path.name}-tries.labels.parquet")


def test_labels_of_two_datasets_need_two_names() -> None:
    assert labels_paths([Path("a/robot"), Path("b/robot")], Path("out"))[1] == Path("out/b-robot.labels.parquet")
    with pytest.raises(ValueError, match="the labels of a/b/robot and c/b/robot would both be out/b-robot"):
        labels_paths([Path("a/b/robot"), Path("c/b/robot")], Path("out"))


def test_datasets_are_named_once_and_not_none(pictures: Path) -> None:
    with pytest.raises(ValueError, match="name at least one"):
        datasets_of([], ["a"])
    with pytest.raises(ValueError, match="is named more than once"):
        datasets_of([str(pictures)], [str(pictures / ".." / pictures.name)])


def test_datasets_of_different_rates_are_refused(dataset: AttemptDataset, tmp_path: Path) -> None:
    slow = shutil.copytree(dataset.path, tmp_path / "slow")
    info = read_json(slow / "meta" / "info.json")
    write_json(slow / "meta" / "info.json", info | {"fps": info["fps"] / 2})
    with pytest.raises(ValueError, match=f"slow has {info['fps'] / 2:g} frames per second"):
        datasets_of([dataset.path, str(slow)], [])


def test_corrections_alone_have_no_threshold_and_no_plot_of_one(dataset: AttemptDataset) -> None:
    zeros = np.zeros(sum(LENGTHS))
    corrected = replace(dataset.attempts, intervention=zeros == 0)
    (judged,), thresholds = judge([replaced(dataset, corrected)], [zeros - 0.5], LONGEST, None, None, {}, 0.3)
    assert judged.positive.all()
    assert thresholds == {}
    assert histogram_section([judged], thresholds).figures == []


def replaced(dataset: AttemptDataset, attempts: Attempts) -> AttemptDataset:
    other = AttemptDataset(dataset.path)
    other.__dict__["attempts"] = attempts
    return other


def test_an_attempt_with_words_of_its_own_can_be_held_out(dataset: AttemptDataset) -> None:
    root = Path(dataset.path)
    (path,) = (root / "data").glob("*/*.parquet")
    table, words = pq.read_table(path), [f"word {number}" for number in range(len(LENGTHS))]
    subtasks = pa.table({"subtask": words, "subtask_index": range(len(words))})
    pq.write_table(subtasks, root / "meta" / "subtasks.parquet")
    if "subtask_index" in table.column_names:
        table = table.drop_columns("subtask_index")
    pq.write_table(table.append_column("subtask_index", table.column("episode_index")), path)
    config, shapes = LeRobotConfig(str(root), val_fraction=0.4), ModelConfig.preset("debug").shapes
    assert len(config.open("tries", "val", shapes)) == 0
    write_json(root / COLLECTED, {})
    assert len(config.open("tries", "val", shapes)) > 0


def test_calibration_tells_a_good_value_from_a_bad_one() -> None:
    rng = np.random.default_rng(0)
    success = rng.random(500) < 0.5
    returns = np.where(success, -0.3 * rng.random(500), -1.0)
    seconds = np.where(np.arange(500) < 250, 2.0, 8.0)  # of two tasks
    good = calibration(returns + 0.05 * rng.normal(size=500), returns, success, seconds)
    bad = calibration(-rng.random(500), returns, success, seconds)
    assert good["auc"] > 0.95 > 0.6 > bad["auc"] > 0.4
    assert good["mean_error"] < 0.1 < good["mean_error_of_a_constant"] < bad["mean_error"]
    assert sum(count for *_, count in good["bins"]) == 500
    assert calibration(returns, returns, np.ones(500, bool), seconds)["auc"] is None
    late = calibration(returns - 0.1, returns, success, seconds)
    assert late["mean_error_seconds"] == pytest.approx(0.1 * seconds[success].mean())
    assert calibration(returns, returns, np.zeros(500, bool), seconds)["mean_error_seconds"] is None


def test_plots_are_pictures() -> None:
    values, success = -np.linspace(0, 1, 30), np.arange(30) < 12
    assert calibration_plot(values, values, success, np.full(30, 4.0)).count("<svg") == 1
    assert histograms({"a": values, "b": values}, {"a": -0.5, "b": -0.1}).count("<svg") == 1
