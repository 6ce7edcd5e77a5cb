"""A validation that a signal or a kill broke off is made up when the run goes on: once, at its step, by its weights."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killable_fit import SIGNAL_AT_BATCH, SIGNAL_IN_VALIDATION, digest, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_stages import ACCUMULATE

MONITOR = "val/robot/continuous_robot_actions/flow_loss"
STEPS, EVERY = 6, 2
Values = list[tuple[int, float]]


def validations(run: Path) -> Values:
    """(step, value) of everything that was logged of one metric, repetitions too."""
    found = []
    for file in sorted(run.glob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        if MONITOR in events.Tags()["scalars"]:
            found += [(event.step, event.value) for event in events.Scalars(MONITOR)]
    return found


@pytest.fixture(scope="session")
def validating(config: Path) -> Callable[..., list[str]]:
    """The command that starts a run which validates every second step, the last one too."""

    def command(run: Path) -> list[str]:
        return [
            *("-c", str(config), "--run", str(run), "--data.num_workers", "0", "--trainer.max_steps", str(STEPS)),
            *("--trainer.limit_val_batches", "1.0", "--data.val_samples", "2", "--model.num_steps", "2"),
            *("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", str(EVERY * ACCUMULATE)),
        ]

    return command


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, validating: Callable[..., list[str]]) -> tuple[Values, str]:
    """What the run that nobody stops logs, and its last weights."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert fit(validating(folder / "run"), folder / "log") == [0], (folder / "log").read_text()
    found = validations(folder / "run")
    assert [step for step, _ in found] == [1, 3, 5]  # counted from 0
    return found, weights(folder / "run")


def weights(run: Path) -> str:
    return digest(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


TERM, KILL = signal.SIGTERM, signal.SIGKILL
CASES = [
    pytest.param(SIGNAL_IN_VALIDATION, 4, TERM, id="SIGTERM-in-validation"),
    pytest.param(SIGNAL_IN_VALIDATION, 4, KILL, id="SIGKILL-in-validation", marks=pytest.mark.slow),
    pytest.param(SIGNAL_IN_VALIDATION, STEPS, TERM, id="SIGTERM-in-the-last-validation", marks=pytest.mark.slow),
    pytest.param(SIGNAL_IN_VALIDATION, STEPS, KILL, id="SIGKILL-in-the-last-validation", marks=pytest.mark.slow),
    pytest.param(
        SIGNAL_AT_BATCH, 4 * ACCUMULATE - 1, TERM, id="SIGTERM-in-the-step-before-validation", marks=pytest.mark.slow
    ),
    pytest.param(SIGNAL_AT_BATCH, 5 * ACCUMULATE - 1, KILL, id="SIGKILL-after-validation", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "number", "signum"), CASES)
def test_validation_that_was_broken_off_is_made_up_once_and_at_its_step(
    validating: Callable[..., list[str]],
    unbroken: tuple[Values, str],
    tmp_path: Path,
    where: str,
    number: int,
    signum: signal.Signals,
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    status = -signum if signum == KILL else 128 + signum
    assert fit(validating(run), log, **{where: number, "SIGNAL": signum}) == [status], log.read_text()
    assert fit(["--ckpt_path", str(run)], log) == [0], log.read_text()
    assert (validations(run), weights(run)) == unbroken


@pytest.mark.slow
def test_validation_that_is_broken_off_again_stays_due_until_it_was_made_up_once(
    validating: Callable[..., list[str]], unbroken: tuple[Values, str], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    for args in (validating(run), ["--ckpt_path", str(run)]):
        codes = fit(args, log, **{SIGNAL_IN_VALIDATION: 4, "SIGNAL": TERM})
        assert codes == [128 + TERM], log.read_text()
    # in the first step after it was made up, of which there is no checkpoint yet
    codes = fit(["--ckpt_path", str(run)], log, **{SIGNAL_AT_BATCH: 4 * ACCUMULATE, "SIGNAL": KILL})
    assert codes == [-KILL], log.read_text()
    assert fit(["--ckpt_path", str(run)], log) == [0], log.read_text()
    assert (validations(run), weights(run)) == unbroken
