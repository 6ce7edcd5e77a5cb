"""A kill while a checkpoint is written leaves a whole one."""

from __future__ import annotations

import signal
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from killable_fit import KILL_AT_FILE_EVENT, fit, start_saving

from pi05_lightning.cli.main import main
from pi05_lightning.training.callbacks.checkpoint import link
from pi05_lightning.training.checkpoint_io import AtomicCheckpointIO
from pi05_lightning.weights.locate import locate_run
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint, find_checkpoint


def kill_while_saving(path: Path) -> None:
    """Leave what a killed process leaves that was about to write a checkpoint."""
    process = start_saving(path, 50_000_000)
    while process.is_alive() and not any(file.stat().st_size > 1000 for file in path.parent.glob("*.part")):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"values": torch.ones(3)}, path)
    kill_while_saving(path)
    assert torch.equal(torch.load(path, weights_only=True)["values"], torch.ones(3))


def test_what_a_kill_left_of_a_checkpoint_is_gone_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    kill_while_saving(path)
    assert [file.name for file in tmp_path.iterdir()] == [".last.ckpt.part"]
    AtomicCheckpointIO().save_checkpoint({"number": 1}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_link_that_a_kill_left_half_made_is_no_obstacle(tmp_path: Path, sharded: bool) -> None:
    checkpoint, last = tmp_path / "1.ckpt", tmp_path / "last.ckpt"
    if sharded:
        checkpoint.mkdir()
    else:
        checkpoint.touch()
    (tmp_path / ".last.ckpt.part").symlink_to(checkpoint.name)
    link(checkpoint, last)
    assert last.readlink() == Path(checkpoint.name)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name, last.name}


def test_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for number in range(2):
        AtomicCheckpointIO().save_checkpoint({"number": number}, path)
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_kill_between_the_last_checkpoint_and_its_link_is_mended_by_the_next_start(
    config: Path, tmp_path: Path
) -> None:
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    args = ["-c", str(config), "--run", str(run), "--data.num_workers", "0", "--trainer.callbacks", "null"]
    main(["fit", *args, "--trainer.max_steps", "2", "--checkpoint.save_top_k", "-1"])
    one, two = sorted(file for file in last.parent.glob("*.ckpt") if not file.is_symlink())
    last.unlink()
    last.symlink_to(one.name)
    main(["fit", *args, "--resume", "auto", "--trainer.max_steps", "2"])
    assert last.resolve() == two.resolve()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a run for each of some fifty events
def test_run_killed_at_any_file_operation_of_its_checkpoints_can_be_resumed(config: Path, tmp_path: Path) -> None:
    stale = 0
    for event in count(1):
        run, log = tmp_path / str(event), tmp_path / "log"
        args = ["-c", str(config), "--run", str(run), "--data.num_workers", "0", "--trainer.max_steps", "3"]
        (code,) = fit(args, log, **{KILL_AT_FILE_EVENT: event})
        saved = list(run.glob("checkpoints/*.ckpt"))
        if saved:  # a link is one, whether or not what it points to exists
            torch.load(find_checkpoint(run), weights_only=True)
            assert (run / "checkpoints" / "last.ckpt").exists() or len(saved) == 1
            newest, last = locate_run(run), run / "checkpoints" / "last.ckpt"
            if newest.steps == 3 and TrainingCheckpoint(last).steps < 3:  # killed before the link to it
                assert fit([*args, "--resume", "auto"], log) == [0], log.read_text()
                assert TrainingCheckpoint(last).steps == 3
                stale += 1
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
    assert event > 6
    assert stale
