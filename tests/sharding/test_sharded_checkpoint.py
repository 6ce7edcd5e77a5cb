"""Checkpoints of sharded weights, averages and optimizer states, read by other numbers of ranks than wrote them."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from small_ranks import (
    Run,
    be_killed,
    check_same,
    end,
    fail_to_write,
    look_elsewhere,
    read_and_write,
    start,
    train_and_write,
    write_in_background,
)

from pi05_lightning.weights.sharded_checkpoint import read


@pytest.mark.slow
def test_from_four_ranks_to_two_to_one_to_two_it_stays_the_same_to_the_bit(tmp_path: Path) -> None:
    log, reference = tmp_path / "log", tmp_path / "reference.pt"
    four, two, one, again = (tmp_path / f"{name}.ckpt" for name in ("four", "two", "one", "again"))
    assert end(start(4, log, train_and_write, 3, four, reference), log) == [0] * 4, log.read_text()
    assert end(start(2, log, read_and_write, four, reference, two), log) == [0] * 2, log.read_text()
    run = Run(seed=2)
    run.restore(two)
    check_same(run.checkpoint(), torch.load(reference))
    torch.save(run.checkpoint(), one)
    assert end(start(2, log, read_and_write, one, reference, again), log) == [0] * 2, log.read_text()
    check_same(read(again), torch.load(reference))
    assert not list(tmp_path.glob(".*"))


def test_what_is_written_in_the_background_is_as_it_was_when_it_began(tmp_path: Path) -> None:
    log, paths = tmp_path / "log", [tmp_path / "first.ckpt", tmp_path / "second.ckpt"]
    assert end(start(2, log, write_in_background, *paths, tmp_path), log) == [0] * 2, log.read_text()
    for path in paths:
        check_same(read(path), torch.load(tmp_path / f"{path.name}.pt"))


def test_where_one_rank_cannot_write_all_say_so_and_leave_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert end(start(2, log, fail_to_write, tmp_path), log) == [0] * 2, log.read_text()


def test_a_folder_that_is_another_one_to_a_rank_is_refused_by_all(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    assert end(start(2, log, look_elsewhere, folder), log) == [0] * 2, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_within_a_write_leaves_the_checkpoint_before_and_no_part_under_a_name(tmp_path: Path, rank: int) -> None:
    log, folder = tmp_path / "log", tmp_path / "checkpoints"
    folder.mkdir()
    codes, kills = [-9], 0
    while any(codes):
        codes = end(start(2, log, be_killed, folder, rank, kills + 1), log)
        assert read(folder / "step=1.ckpt")["global_step"] == 1
        for path in folder.glob("step=2.ckpt"):
            assert read(path)["global_step"] == 2
            shutil.rmtree(path)
        kills += any(codes)
    assert kills >= 2, log.read_text()
    assert [path.name for path in folder.iterdir()] == ["step=1.ckpt"]


def test_state_in_eight_bits_stays_so_to_the_bit(tmp_path: Path) -> None:
    from eight_bits import check_same, exp_avg, state, write_and_read

    log, path = tmp_path / "log", tmp_path / "eight.ckpt"
    assert end(start(2, log, write_and_read, path), log) == [0, 0], log.read_text()
    check_same(exp_avg(read(path)), state())


@pytest.mark.slow
def test_state_in_eight_bits_goes_on_and_keeps_its_values_from_four_ranks_to_two_to_one(tmp_path: Path) -> None:
    from eight_bits import go_on, pass_on, values

    log, four, two, one = tmp_path / "log", *(tmp_path / f"{name}.ckpt" for name in ("four", "two", "one"))
    assert end(start(4, log, go_on, four), log) == [0] * 4, log.read_text()
    assert end(start(2, log, pass_on, four, two), log) == [0] * 2, log.read_text()
    pass_on(two, one)
    assert end(start(4, log, pass_on, one, tmp_path / "again.ckpt"), log) == [0] * 4, log.read_text()
    expected, *others = (read(path)["optimizer_states"][0]["state"] for path in tmp_path.glob("*.ckpt"))
    assert len(others) == 3
    assert {type(state["exp_avg"]).__name__ for state in expected.values()} == {"OptimState8bit", "Tensor"}
    for other in others:
        for number, state in expected.items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(values(other[number][key]), values(state[key])), (number, key)


def test_state_in_eight_bits_of_one_file_is_read_as_a_whole_and_by_two_ranks(tmp_path: Path) -> None:
    from eight_bits import Layers, Run, parts, pass_on

    log, file, folder = tmp_path / "log", tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    run = Run(Layers)
    run.train(1)
    torch.save(run.checkpoint(), file)
    assert end(start(2, log, pass_on, file, folder), log) == [0, 0], log.read_text()
    for path in (file, folder):
        found = read(path)["optimizer_states"][0]["state"]
        for number, state in run.optimizer.state_dict()["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                pairs = zip(parts(found[number][key]), parts(state[key]), strict=True)
                assert all(torch.equal(*pair) for pair in pairs), (path, number, key)


@pytest.mark.slow
def test_state_in_eight_bits_of_which_ranks_would_divide_blocks_is_refused(tmp_path: Path) -> None:
    from eight_bits import write_and_refuse

    log, path = tmp_path / "log", tmp_path / "two.ckpt"
    for ranks, reads in ((2, False), (4, True)):
        work = partial(write_and_refuse, reads=reads)
        assert end(start(ranks, log, work, path), log) == [0] * ranks, log.read_text()
    read(path)


def test_metadata_execute_nothing(tmp_path: Path) -> None:
    """DCP's own reader would: its metadata are a pickle."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Path.touch))
    torch.save({"pi05": {}, "state_dict": ["a"]}, tmp_path / "meta.pt")
    with pytest.raises(ValueError, match="pathlib"):
        read(tmp_path)
