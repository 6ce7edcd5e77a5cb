"""A value that `pi05 value fit` made: what it says of frames, and the labels that `pi05 value label` writes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pi05_lightning.cli.main import main
from pi05_lightning.cli.value_fit import value_fit
from pi05_lightning.cli.value_label import frames_ahead, value_label
from pi05_lightning.data.labels import POSITIVE, Labels
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.experience.reading import CLASS_PATH, Reading
from pi05_lightning.experience.value import AttemptDataset, ValueFunction, read_value
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.module.pi05_module import DEFAULT_LR
from tests.experience.attempts import LENGTHS, recorded_attempts


@pytest.fixture(scope="module")
def attempts(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_attempts(pictures, tmp_path_factory.mktemp("attempts") / "tries")


@pytest.fixture(scope="module")
def demonstrations(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(
        pictures, tmp_path_factory.mktemp("demos") / "robot", ignore=shutil.ignore_patterns("pi05_*")
    )


@pytest.fixture(scope="module")
def value(attempts: Path, demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a policy that was trained for one step."""
    folder = tmp_path_factory.mktemp("value")
    content = {
        "model": {"config": "debug"},
        "data": {
            "sources": {"robot": {"class_path": CLASS_PATH, "init_args": {"path": str(demonstrations)}}},
            "language": {"prompts": {"clip_state": False}, "no_task_share": 0.1},
            "batch_size": 2,
            "num_workers": 0,
        },
        "stages": {"pretrain_steps": 0, "posttrain_steps": 1, "posttrain": {"losses": {"subtask": 0, "flow": 1.0}}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
    }
    (folder / "policy.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(folder / "policy.yaml"), "--run", str(folder / "policy")])
    fit(folder / "value", attempts, demonstrations)
    return folder / "value"


def fit(value: Path, *datasets: Path, **options: Any) -> None:
    rollouts, *demonstrations = map(str, datasets)
    tried = {"rollouts": (rollouts,), "demonstrations": tuple(demonstrations), "val_fraction": 0.4}
    value_fit(value, policy=value.parent / "policy", **(tried | {"steps": 2, "batch_size": 4} | options))


def test_value_says_what_its_numbers_mean_and_how_good_it_is(value: Path) -> None:
    fitted = ValueFunction(value)
    assert fitted.longest == {"close the drawer": 15, "open the drawer": 9}
    assert fitted.fps == 10
    found = read_json(value / "calibration.json")
    assert found["frames"] > 0
    assert "mean error" in (value / "value.html").read_text()


def test_value_reads_the_prompts_that_its_policy_reads(value: Path) -> None:
    language = ValueFunction(value).processor.language
    assert (language.prompts.clip_state, language.no_task_share, language.condition_on) == (False, 0.1, "task")


def test_value_learns_at_the_rate_of_its_policy(value: Path) -> None:
    written = yaml.safe_load((value / "value.yaml").read_text())
    assert written["model"]["optimizer"]["init_args"]["lr"] == DEFAULT_LR


def test_value_is_found_by_its_checkpoint_too_and_one_that_was_not_fitted_to_its_end_is_refused(
    value: Path, tmp_path: Path
) -> None:
    assert ValueFunction(value / "checkpoints" / "last.ckpt").longest == ValueFunction(value).longest
    begun = shutil.copytree(value, tmp_path / "begun", ignore=shutil.ignore_patterns("value.json"))
    with pytest.raises(ValueError, match=r"begun has no whole value\.json, so its value was not fitted to its end"):
        ValueFunction(begun)


def test_a_refused_fit_leaves_what_the_run_has(value: Path, attempts: Path, demonstrations: Path) -> None:
    before = {file: file.read_bytes() for file in (value / "returns").iterdir()}
    with pytest.raises(ValueError, match="written with other options"):
        fit(value, attempts)
    with pytest.raises(ValueError, match="written with other options"):
        fit(value, attempts, demonstrations, seed=1)
    assert {file: file.read_bytes() for file in (value / "returns").iterdir()} == before


def test_options_that_no_step_was_made_with_may_be_mended(
    value: Path, attempts: Path, demonstrations: Path, tmp_path: Path
) -> None:
    shutil.copytree(value.parent / "policy", tmp_path / "policy")
    with pytest.raises(ValueError, match=r"more than data\.language\.max_tokens"):
        fit(tmp_path / "value", attempts, demonstrations, options=("--data.language.max_tokens", "2"))
    assert (tmp_path / "value" / "config.yaml").is_file()
    fit(tmp_path / "value", attempts, demonstrations, steps=1)


def test_value_of_a_frame_is_the_same_whatever_is_asked_beside_it(value: Path, attempts: Path) -> None:
    fitted, dataset = ValueFunction(value), AttemptDataset(str(attempts))
    options = Reading.of(value).options(dataset.path, dataset.path)
    everywhere = fitted.everywhere(dataset, options)
    assert everywhere.shape == (sum(LENGTHS),)
    assert ((everywhere >= -1) & (everywhere <= 0)).all()
    alone = LeRobotConfig(**options | {"path": dataset.path, "episodes": "length == 7"})
    source = alone.open("alone", "train", fitted.processor.shapes)
    source.prepare()
    begin = sum(LENGTHS[:3])
    np.testing.assert_allclose(fitted.of(source), everywhere[begin : begin + LENGTHS[3]], atol=1e-5)


def test_datasets_are_labelled_together_by_one_threshold_a_task(
    value: Path, attempts: Path, demonstrations: Path, tmp_path: Path
) -> None:
    written = value_label(value, (str(attempts),), (str(demonstrations),), positive_share=0.4, out=tmp_path / "labels")
    assert list(written) == [str(demonstrations), str(attempts)]
    datasets = [AttemptDataset(str(demonstrations), demonstrations=True), AttemptDataset(str(attempts))]
    found = [Labels.read(Path(written[one.path]), one.files) for one in datasets]
    columns = {name: np.concatenate([labels.columns[name] for labels in found]) for name in found[0].columns}
    tasks, corrected = (
        np.concatenate([getattr(one.attempts, name) for one in datasets]) for name in ("task", "intervention")
    )
    np.testing.assert_allclose(columns["advantage"], columns["return"] - columns["value"], atol=1e-6)
    thresholds = found[0].about["thresholds"]
    above = columns["advantage"] > np.array([thresholds[task] for task in tasks], np.float32)
    np.testing.assert_array_equal(columns[POSITIVE], above | corrected)
    assert (tmp_path / "labels" / "labels.html").is_file()


def test_attempts_of_another_rate_are_refused(value: Path, attempts: Path, tmp_path: Path) -> None:
    slow = shutil.copytree(attempts, tmp_path / "slow")
    info = read_json(slow / "meta" / "info.json")
    write_json(slow / "meta" / "info.json", info | {"fps": info["fps"] / 2})
    with pytest.raises(ValueError, match=r"slow has 5 frames per second, and .* was fitted on 10"):
        value_label(value, (str(slow),))


def test_frame_that_is_read_nowhere_is_named_before_any_value_is_computed(
    value: Path, attempts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(attempts, tmp_path / "other")
    info = read_json(other / "meta" / "info.json")
    write_json(other / "meta" / "info.json", info | {"splits": {"train": "0:3", "val": "3:4"}})
    monkeypatch.setattr(ValueFunction, "of", None)
    with pytest.raises(ValueError, match="episode 4, frame 0: it is left out as bad, or is in no split"):
        value_label(value, (str(other),))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positive_share": 30.0}, "positive_share: 30.0 is no share"),
        ({"positive_shares": {"opne it": 0.3}}, "there is no task 'opne it'"),
        ({"out": Path(__file__)}, r"cannot write to .* \(Not a directory\): name another --out"),
        ({"device": "cuda:9"}, "device 'cuda:9' cannot be used"),
    ],
)
def test_a_wrong_option_is_refused_before_any_value_is_computed(
    value: Path, attempts: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(ValueFunction, "of", None)
    with pytest.raises(ValueError, match=said):
        value_label(value, (str(attempts),), **options)


def test_frames_ahead_are_told_in_one_way() -> None:
    assert [frames_ahead(*how, fps=10.0) for how in ((None, None), (7, None), (None, 0.5))] == [None, 7, 5]
    with pytest.raises(ValueError, match="not both"):
        frames_ahead(5, 0.5, 10.0)
    with pytest.raises(ValueError, match="0 frames are no time"):
        frames_ahead(None, 0.01, 10.0)


def test_policy_is_no_value(value: Path, attempts: Path) -> None:
    with pytest.raises(ValueError, match="is no run of a value, but of a policy"):
        value_label(value.parent / "policy", (str(attempts),))


def test_averaged_weights_are_those_of_the_value(value: Path, tmp_path: Path) -> None:
    run = shutil.copytree(value, tmp_path / "value", symlinks=True)
    file = (run / "checkpoints" / "last.ckpt").resolve()
    content = torch.load(file)
    name = next(name for name in content["state_dict"] if name.endswith("out.bias") and "value" in name)
    averaged = {name.removeprefix("model."): content["state_dict"][name] + 1}
    torch.save(content | {"ema": averaged}, file)
    own, found = read_value(value)[1], read_value(run)[1]
    assert [name for name in own if not torch.equal(own[name], found[name])] == list(averaged)


def test_labels_can_be_trained_on(value: Path, attempts: Path, tmp_path: Path) -> None:
    (labels,) = value_label(value, (str(attempts),), out=tmp_path).values()
    source = LeRobotConfig(str(attempts), labels=labels, frames="positive").open(
        "tries", "train", ValueFunction(value).processor.shapes
    )
    sign = pq.read_table(labels)[POSITIVE].to_pylist()
    assert len(source) == sum(sign)
    assert {source[index].advantage for index in range(len(source))} == {"positive"}
