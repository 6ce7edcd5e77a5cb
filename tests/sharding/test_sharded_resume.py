"""Sharded runs of `pi05 fit` that are killed, stopped, and gone on with on other numbers of ranks."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from gathered import digests
from killable_fit import KILL_AT_BATCH, KILL_AT_FILE_EVENT, SIGNAL_AT_BATCH, digest, fit, lines

from pi05_lightning.weights.locate import locate_run
from pi05_lightning.weights.sharded_checkpoint import is_sharded, read
from pi05_lightning.weights.training_checkpoint import checkpoints_in

BATCHES = 14  # two for each step


def fit_sharded(args: list[str], log: Path, ranks: int = 2, **environment: int | str) -> list[int | None]:
    return fit(args, log, ranks, "fsdp2", **environment)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, two_stages: Path) -> Path:
    """The run on two ranks that nobody kills."""
    run = tmp_path_factory.mktemp("whole") / "run"
    log = run.parent / "log"
    assert fit_sharded(["-c", str(two_stages), "--run", str(run)], log) == [0, 0], log.read_text()
    return run


def check_ends_as(run: Path, whole: Path) -> None:
    found, expected = (read(folder / "checkpoints" / "last.ckpt") for folder in (run, whole))
    assert digests(found) == digests(expected)
    for part in ("global_step", "lr_schedulers"):
        assert digest(found[part]) == digest(expected[part])
    for rank in range(2):
        did, should = lines(run, rank), lines(whole, rank)
        assert list(should) == list(range(BATCHES))
        assert did.keys() == should.keys()
        for batch, attempts in did.items():
            assert all(line == should[batch][0] for line in attempts), batch


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_kills_at_random_moments_change_no_bit(
    tmp_path: Path, two_stages: Path, whole: Path, in_background: bool
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    start = ["-c", str(two_stages), "--run", str(run), "--resume", "auto"]
    start += ["--checkpoint.in_background", str(in_background).lower()]
    seed = random.randrange(1000)
    draw = random.Random(seed)
    for kill in range(6):
        where = {KILL_AT_BATCH: draw.randrange(BATCHES)} if kill % 2 else {KILL_AT_FILE_EVENT: draw.randrange(1, 40)}
        codes = fit_sharded(start, log, **where)
        for path in checkpoints_in(run):
            assert read(path)["global_step"] >= 1  # every name is that of a whole one
        if codes == [0, 0]:
            break
        assert -signal.SIGKILL in codes, f"seed {seed}: {log.read_text()}"
    if codes != [0, 0]:
        assert fit_sharded(start, log) == [0, 0], f"seed {seed}: {log.read_text()}"
    check_ends_as(run, whole)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_it_goes_on(tmp_path: Path, two_stages: Path, whole: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    start = ["-c", str(two_stages), "--run", str(run)]
    codes = fit_sharded(start, log, **{SIGNAL_AT_BATCH: 5, "SIGNAL": int(signal.SIGTERM)})
    assert codes == [128 + signal.SIGTERM] * 2, log.read_text()
    assert locate_run(run).steps == 3
    assert fit_sharded(["--ckpt_path", str(run)], log) == [0, 0], log.read_text()
    check_ends_as(run, whole)


@pytest.mark.slow
def test_replicas_go_on_after_kills_with_slices_in_the_hosts_memory_too(tmp_path: Path, two_stages: Path) -> None:
    """Offloaded or not, and of one replica or two, it is the same run to the bit, or begins with the same bits."""
    log = tmp_path / "log"
    whole, run, other = (["-c", str(two_stages), "--run", str(tmp_path / name)] for name in ("whole", "run", "other"))
    batch = ["--data.batch_size", "1"]
    replicas, offloaded = (
        json.dumps({"class_path": "pi05_lightning.training.sharding.FSDP2", "init_args": {"replicas": 2} | more})
        for more in ({}, {"offload": True})
    )
    assert fit([*whole, *batch], log, 4, replicas) == [0] * 4, log.read_text()
    going_on = [*run, *batch, "--resume", "auto"]
    for strategy, kill in ((replicas, {KILL_AT_BATCH: 7}), (offloaded, {KILL_AT_FILE_EVENT: 12}), (offloaded, {})):
        codes = fit(going_on, log, 4, strategy, **kill)
        assert -signal.SIGKILL in codes if kill else codes == [0] * 4, log.read_text()
    found, expected = (digests(read(tmp_path / name / "checkpoints" / "last.ckpt")) for name in ("run", "whole"))
    assert found == expected
    more = ["--ckpt_path", str(tmp_path / "run"), "--stages.posttrain_steps", "5", "--data.batch_size", "2"]
    assert fit_sharded([*other, *more], log) == [0, 0], log.read_text()
    assert json.loads((tmp_path / "other" / "begins-with-7.json").read_text()) == expected


@pytest.mark.slow
def test_from_four_ranks_to_two_to_one_to_two_the_global_batch_stays_the_same(tmp_path: Path, two_stages: Path) -> None:
    log = tmp_path / "log"
    one, run = tmp_path / "one", tmp_path / "run"
    assert fit(["-c", str(two_stages), "--run", str(one), "--data.batch_size", "4"], log) == [0], log.read_text()
    begin = ["-c", str(two_stages), "--run", str(run), "--resume", "auto"]
    keys: dict[int, list[int]] = {}
    for ranks, steps in ((4, 2), (2, 4), (1, 5), (2, 7)):
        (run / "rank0.jsonl").parent.mkdir(exist_ok=True)
        for file in run.glob("rank*.jsonl"):
            file.unlink()
        before = locate_run(run) if checkpoints_in(run) else None
        expected = digests(read(before.path)) if before else None
        batch = ["--data.batch_size", str(4 // ranks), "--trainer.max_steps", str(steps)]
        strategy = fit_sharded if ranks > 1 else fit
        assert strategy([*begin, *batch], log, ranks) == [0] * ranks, log.read_text()
        if before is not None:
            found = json.loads((run / f"begins-with-{before.steps}.json").read_text())
            assert found == expected
            assert is_sharded(before.path) == (before.steps != 5)
        for rank in range(ranks):
            for batch_number, attempts in lines(run, rank).items():
                keys.setdefault(batch_number, []).extend(attempts[0]["keys"])
    should = {batch: attempts[0]["keys"] for batch, attempts in lines(one, 0).items()}
    assert {batch: sorted(drawn) for batch, drawn in keys.items()} == {b: sorted(k) for b, k in should.items()}
