"""A run with everything that watches it, killed at random steps, is bit for bit the run that nobody killed."""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from killable_fit import KILL_AT_BATCH, SIGNAL_AT_BATCH, digest, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS

STEPS = PRETRAIN_STEPS + POSTTRAIN_STEPS


class Case(NamedTuple):
    precision: str
    ema: bool
    lora: bool
    accumulate: int
    workers: int
    frozen_vision: bool

    def __str__(self) -> str:
        named = {name: value for name, value in self._asdict().items() if not isinstance(value, bool)}
        flags = [name for name in ("ema", "lora", "frozen_vision") if getattr(self, name)]
        return "-".join([*(f"{name}={value}" for name, value in named.items()), *flags])

    @property
    def args(self) -> list[str]:
        lora = '{"rank": 4, "dropout": 0.1}' if self.lora else "null"
        frozen = r'["backbone\\.vision"]' if self.frozen_vision else "[]"
        return [
            *("--trainer.precision", self.precision, "--trainer.accumulate_grad_batches", str(self.accumulate)),
            *("--ema.decay", "0.9" if self.ema else "null", "--model.lora", lora, "--stages.pretrain.freeze", frozen),
            *("--data.num_workers", str(self.workers), "--model.optimizer", "torch.optim.AdamW"),
            *("--model.optimizer.init_args.lr", "1e-3", "--model.optimizer.init_args.fused", "true"),
            *("--trainer.limit_val_batches", "1.0", "--data.val_samples", "2", "--model.num_steps", "2"),
            *("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", str(2 * self.accumulate)),
            *("--trainer.log_every_n_steps", "1"),
        ]


FAST = Case("bf16-mixed", ema=True, lora=True, accumulate=2, workers=2, frozen_vision=True)
ALL = [
    Case(*values)
    for values in product(("32-true", "bf16-mixed", "bf16-true"), *[(True, False)] * 2, (1, 2), (0, 2), (True, False))
]
CASES = [pytest.param(case, id=str(case)) for case in sorted(ALL, key=lambda case: case != FAST)]


def losses(run: Path) -> dict[tuple[str, int], set[float]]:
    """Everything that was logged of the model and not of the clock, by name and step."""
    found = defaultdict(set)
    for file in run.glob("events.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(("loss/", "grad_norm/", "lr/", "val/", "stage")):
                for event in events.Scalars(tag):
                    found[tag, event.step].add(event.value)
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_run_killed_at_random_steps_has_the_same_bits(config: Path, tmp_path: Path, case: Case) -> None:
    log = tmp_path / "log"

    def start(run: Path) -> list[str]:
        return ["-c", str(config), "--run", str(run), *case.args]

    draw = random.Random(str(case))
    batches = STEPS * case.accumulate
    # after its first step, so that there is a checkpoint; the switch's own steps are among them now and then
    kills = sorted(draw.sample(range(case.accumulate + 1, batches - 1), 2))
    ends = [(KILL_AT_BATCH, -signal.SIGKILL), (SIGNAL_AT_BATCH, 128 + signal.SIGTERM)]
    print("stopped at batches", kills, "of", batches)
    assert fit(start(tmp_path / "whole"), log) == [0], log.read_text()
    for number, (batch, (how, code)) in enumerate(zip(kills, ends, strict=True)):
        args = ["--ckpt_path", str(tmp_path / "stopped")] if number else start(tmp_path / "stopped")
        assert fit(args, log, **{how: batch, "SIGNAL": signal.SIGTERM}) == [code], log.read_text()
    assert fit(["--ckpt_path", str(tmp_path / "stopped")], log) == [0], log.read_text()

    whole, stopped = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "stopped")
    )
    assert whole["global_step"] == STEPS
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", *(["ema"] if case.ema else [])):
        assert digest(stopped[part]) == digest(whole[part]), part
    expected = losses(tmp_path / "whole")
    assert all(len(values) == 1 for values in expected.values())
    assert losses(tmp_path / "stopped") == expected
