"""Sharded runs of adapters: checkpoints leave out the base, and go on with it on any number of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gathered import digests
from killable_fit import KILL_AT_BATCH, KILL_AT_FILE_EVENT, fit
from sharded_ranks import on_ranks
from sharded_runs import validate

from pi05_lightning import Pi05Policy
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.sharded_checkpoint import AVERAGE, STATE_DICT, STATES, is_sharded, read
from tests.untrained import untrained_weights

STEPS = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to put adapters beside."""
    return untrained_weights(tmp_path_factory.mktemp("start") / "weights", seed=5)


@pytest.fixture(scope="module")
def options(two_stages: Path, start: Path) -> list[str]:
    return ["-c", str(two_stages), "--model.lora.rank", "2", "--model.init_from", str(start)]


def train(options: list[str], run: Path, ranks: int, steps: int = STEPS, **environment: int) -> list[int | None]:
    """The global batch is the same on any number of ranks."""
    args = [*options, "--run", str(run), "--trainer.max_steps", str(steps), "--data.batch_size", str(4 // ranks)]
    log = run.with_name(f"{run.name}.log")
    codes = fit(args, log, ranks, "fsdp2", **environment)
    assert environment or codes == [0] * ranks, log.read_text()
    return codes


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Path:
    """The run of two ranks."""
    run = tmp_path_factory.mktemp("adapters") / "run"
    train(options, run, 2)
    return run


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def begins_with(options: list[str], run: Path, ranks: int, checkpoint: Path) -> dict[str, str]:
    """The digests of what a run begins with that goes on with a checkpoint."""
    train([*options, "--ckpt_path", str(checkpoint)], run, ranks, STEPS + 1)
    return json.loads((run / f"begins-with-{STEPS}.json").read_text())


@pytest.mark.slow
def test_what_is_trained_alone_is_saved_and_the_policy_is_that_of_a_file(
    sharded: Path, start: Path, tmp_path: Path
) -> None:
    assert is_sharded(last(sharded))
    content = read(last(sharded))
    frozen = Lora(rank=2).frozen
    assert any(".lora_" in name for name in content[STATE_DICT])
    assert not [name for name in content[STATE_DICT] if re.search(frozen, name)]
    assert content["pi05"]["adapter_base"]["place"] == str(start)
    assert content["pi05"]["adapter_base"]["sha256"] == locate(start).content_hash()
    single = tmp_path / "run" / "checkpoints" / "last.ckpt"
    single.parent.mkdir(parents=True)
    torch.save(content, single)
    found, expected, base = (locate(path).tensors() for path in (sharded, single, start))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in base.items())
    chunks = []
    for path in (sharded, single):
        policy = Pi05Policy.from_pretrained(path, device="cpu")
        images = {camera: torch.zeros(3, 28, 28) for camera in policy.inputs.cameras}
        chunks.append(policy.predict_chunk({"task": "open the drawer", "state": np.zeros(3), "image": images}))
    assert np.array_equal(*chunks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 2), (2, 4)])
def test_it_goes_on_with_what_was_saved_whatever_the_number_of_ranks(
    sharded: Path, options: list[str], tmp_path: Path, ranks: tuple[int, int]
) -> None:
    saved = digests(read(last(sharded)))
    one, other = (begins_with(options, tmp_path / f"{n}", n, last(sharded)) for n in ranks)
    assert one == other
    assert {part: one[part] for part in (AVERAGE, STATES)} == {part: saved[part] for part in (AVERAGE, STATES)}


@pytest.mark.slow
def test_a_file_of_one_process_goes_on_sharded(options: list[str], tmp_path: Path) -> None:
    train(options, tmp_path / "one", 1)
    file = last(tmp_path / "one")
    assert not is_sharded(file)
    assert begins_with(options, tmp_path / "two", 2, file) == begins_with(options, tmp_path / "again", 1, file)


@pytest.mark.slow
def test_kills_change_no_bit(sharded: Path, options: list[str], tmp_path: Path) -> None:
    whole, run, going_on = tmp_path / "whole", tmp_path / "run", [*options, "--resume", "auto"]
    train(options, whole, 2, 7)
    for kill in ({KILL_AT_BATCH: 3}, {KILL_AT_FILE_EVENT: 9}, {KILL_AT_BATCH: 10}):
        assert -9 in train(going_on, run, 2, 7, **kill)
    train(going_on, run, 2, 7)
    assert digests(read(last(run))) == digests(read(last(whole)))


@pytest.mark.slow
def test_ranks_begin_with_a_sharded_run_of_adapters_merged(sharded: Path, options: list[str], tmp_path: Path) -> None:
    """Each keeps its slices of what one process merges."""
    begin = [*options[:-1], str(sharded)]
    found = []
    for ranks in (1, 2):
        train(begin, tmp_path / f"{ranks}", ranks, 1)
        found.append(json.loads((tmp_path / f"{ranks}" / "begins-with-0.json").read_text())[STATE_DICT])
        content = read(last(tmp_path / f"{ranks}"))
        assert content["pi05"]["adapter_base"]["sha256"] == locate(sharded).content_hash()
    assert found[0] == found[1]


@pytest.mark.slow
def test_it_is_validated_on_any_number_of_ranks(sharded: Path, tmp_path: Path) -> None:
    validate(str(sharded), str(tmp_path / "one"), 1)
    on_ranks(2, validate, str(sharded), str(tmp_path / "two"), 2)
    found, expected = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("two", "one"))
    assert expected["robot/continuous_robot_actions"]["samples"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_a_base_that_is_missing_ends_all_ranks_with_its_hash(sharded: Path, start: Path, tmp_path: Path) -> None:
    sha256, hidden = locate(start).content_hash(), start.with_name("hidden")
    start.rename(hidden)
    try:
        log = tmp_path / "log"
        args = ["--ckpt_path", str(sharded), "--run", str(tmp_path / "run"), "--trainer.max_steps", "5"]
        assert fit(args, log, 2, "fsdp2", kill_others=False) == [1, 1]
        assert log.read_text().count(f"weights with the SHA-256 {sha256}") == 2
    finally:
        hidden.rename(start)
