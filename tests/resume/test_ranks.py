"""Two ranks train as one rank with twice the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from killable_fit import fit, lines


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory, config: Path) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    args = ["-c", str(config), "--run", str(folder / "run"), "--data.num_workers", "0", "--data.batch_size", "8"]
    assert fit(args, folder / "log") == [0], (folder / "log").read_text()
    return {batch: attempts[0] for batch, attempts in lines(folder / "run", 0).items()}


@pytest.fixture(scope="session")
def two_ranks(whole: Any) -> list[dict[int, dict[str, Any]]]:
    return [{batch: attempts[0] for batch, attempts in lines(whole(2), rank).items()} for rank in range(2)]


@pytest.mark.slow
def test_ranks_that_opened_different_checkpoints_end_together(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    args = ["-c", str(config), "--run", str(run), "--data.num_workers", "0", "--trainer.max_steps", "2"]
    assert fit([*args, "--checkpoint.save_top_k", "-1"], log) == [0], log.read_text()
    first, second = sorted(path for path in (run / "checkpoints").glob("*.ckpt") if not path.is_symlink())
    each = [["--ckpt_path", str(first)], ["--ckpt_path", str(second)]]
    codes = fit(["--trainer.limit_val_batches", "1"], log, 2, command="validate", each=each, kill_others=False)
    assert codes == [1, 1]
    assert log.read_text().count("the ranks opened different checkpoints (of the steps 1, 2)") == 2
    assert not (run / "metrics.json").exists()


def test_two_ranks_see_what_one_rank_with_twice_the_batch_sees(one_rank: dict, two_ranks: list[dict]) -> None:
    for batch, whole_line in one_rank.items():
        parts = [rank[batch]["keys"] for rank in two_ranks]
        assert not set(parts[0]) & set(parts[1])
        assert sorted(parts[0] + parts[1]) == sorted(whole_line["keys"])


def test_loss_of_a_step_is_that_of_one_rank_though_ranks_differ_in_tokens(
    one_rank: dict, two_ranks: list[dict]
) -> None:
    assert any(two_ranks[0][batch]["targets"] != two_ranks[1][batch]["targets"] for batch in one_rank)
    for batch, line in one_rank.items():
        for rank in two_ranks:
            # gradients agree too, or the losses would part from the second step on
            assert float.fromhex(rank[batch]["loss"]) == pytest.approx(float.fromhex(line["loss"]), rel=2e-4), batch
