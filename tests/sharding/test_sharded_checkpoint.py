"""Checkpoints of sharded weights, averages and optimizer states, read by other numbers of ranks than wrote them."""

from pathlib import Path

import torch
from small_ranks import Run, check_same, end, read_and_write, start, train_and_write

from pi05_lightning.weights.sharded_checkpoint import read


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
