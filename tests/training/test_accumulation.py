"""N accumulated batches are one batch N times as large, on one rank and on two: for every term, and its gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pi05_lightning.data.processor import Language
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from tests.random_fast import random_fast

from . import one_step

SCRIPT = Path(one_step.__file__)
TERMS = ("text", "subtask", "fast", "location", "flow", "quiet")


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast")
    random_fast(ModelConfig.preset("tiny"), scale=3).save(folder)
    return folder


@pytest.fixture(scope="module")
def one_batch(videos: Path, fast: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return one_step.main(str(videos), str(fast), tmp_path_factory.mktemp("one"), 1, 1)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to rounding: losses of every term that there is, and every parameter's gradient."""
    for step in range(one_step.STEPS):
        losses = found["losses"][step]
        assert losses.keys() == {*(f"loss/posttrain/{term}" for term in TERMS), "loss/total"}
        assert losses == pytest.approx(expected["losses"][step], rel=1e-4)
        gradients, whole = found["gradients"][step], expected["gradients"][step]
        assert gradients.keys() == whole.keys()
        size = torch.stack([x.norm() for x in whole.values()]).norm()
        errors = {name: (gradients[name] - x).norm() / size for name, x in whole.items()}
        assert max(errors.values()) < 1e-5, max(errors, key=lambda name: errors[name])


@pytest.mark.slow_cases
@pytest.mark.parametrize("accumulate", [2, 4, 12])
def test_accumulated_batches_give_the_losses_and_gradients_of_one_batch(
    one_batch: dict[str, Any], videos: Path, fast: Path, tmp_path: Path, accumulate: int
) -> None:
    check(one_step.main(str(videos), str(fast), tmp_path, 1, accumulate), one_batch)


def test_batch_without_targets_is_no_error_in_a_step_that_has_some(train: Callable[..., Any], tmp_path: Path) -> None:
    """Of actions, those before an episode's first subtask have none."""
    said = StageOptions(LossWeights(subtask=1), {"robot/continuous_robot_actions": 1.0})
    options: dict[str, Any] = {
        "stages": {"pretrain": said, "posttrain": said},
        "module_options": {"optimizer": partial(torch.optim.SGD, lr=0.1)},
    }
    data = {"language": Language(condition_on="both"), "length_window": 1}
    final = []
    for size, accumulate in ((8, 1), (1, 8)):
        trainer = train(data_options=data | {"batch_size": size}, accumulate_grad_batches=accumulate, **options)
        final.append(trainer.lightning_module.state_dict())
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=1e-4, atol=1e-5)


def test_step_without_targets_is_refused(train: Callable[..., Any]) -> None:
    stage = StageOptions(LossWeights(others={"absent": 1}), {"robot/qa": 1.0})
    with pytest.raises(ValueError, match=r"this step has nothing that the stage trains on: .*absent"):
        train(
            stages={"pretrain": stage, "posttrain": stage},
            module_options={"heads": {"absent": one_step.AbsentHead}},
            accumulate_grad_batches=2,
        )


@pytest.mark.slow
def test_accumulated_batches_of_two_ranks_give_the_losses_and_gradients_of_one_batch(
    one_batch: dict[str, Any], videos: Path, fast: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), str(videos), str(fast), str(tmp_path), "2", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        check(torch.load(tmp_path / f"{rank}.pt", weights_only=True), one_batch)
