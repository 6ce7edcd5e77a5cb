"""Runs of a sharded model come to what one process comes to: losses, gradients, weights and their average."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_ranks import on_ranks
from sharded_runs import FSDP2, several, train, two_stages
from torch import Tensor

from pi05_lightning.models.parallelize import Lora

# Adam's division blows up the rounding of a gradient that is 0 but for rounding, as those of keys' biases are
ADAMW = partial(torch.optim.AdamW, lr=1e-3, eps=1e-5)
CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": (10, 10), "module": {}},
    "vision frozen at first": {"stages": two_stages(freeze=(r"backbone\.vision",)), "gradient_clip_val": 0.5},
    "accumulation": {
        "accumulate_grad_batches": 2,
        "module": {"activation_checkpointing": True, "flow_draws": 2, "rtc_max_delay": 3},
    },
    "adapters": {"module": {"lora": Lora(rank=4), "knowledge_insulation": True}},
    "keypoints": {"model": "tiny", "stages": two_stages(location=1), "module": {"optimizer": torch.optim.SGD}},
}
LOOSER = {"keypoints": 1e-4}  # a softmax over the image's places: with ddp, too
STEPS = (3, 3)


def options(name: str) -> dict[str, Any]:
    case = {"steps": STEPS} | CASES[name]
    return case | {"module": {"optimizer": ADAMW} | case.get("module", {})}


def norm(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


def check(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Equal but for rounding: each loss to 1e-6 of itself, all else by its norm."""
    assert len(found["losses"]) == len(expected["losses"]) > 0
    for losses, then in zip(found["losses"], expected["losses"], strict=True):
        assert losses == pytest.approx(then, rel=tolerance / 10)
    pairs = [*zip(found["gradients"], expected["gradients"], strict=True)]
    for tensors, then in [*pairs, *((found[part], expected[part]) for part in ("weights", "average"))]:
        assert tensors.keys() == then.keys()
        assert norm({name: tensors[name] - value for name, value in then.items()}) <= tolerance * norm(then)


@pytest.fixture(scope="module")
def on_two_ranks(videos: Path, fast: Path) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(2, several, str(videos), str(fast), 2, {name: options(name) for name in CASES})


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(
    on_two_ranks: list[dict[str, dict[str, Any]]], videos: Path, fast: Path, name: str
) -> None:
    one = train(str(videos), str(fast), 1, **options(name))
    for rank in on_two_ranks:
        check(rank[name], one, LOOSER.get(name, 1e-5))


@pytest.mark.slow
def test_four_ranks_train_as_one_process_with_replicas_too(videos: Path, fast: Path) -> None:
    cases = {"one replica": options("plain"), "two replicas": options("plain") | {"strategy": FSDP2(replicas=2)}}
    one = train(str(videos), str(fast), 1, **options("plain"))
    for rank in on_ranks(4, several, str(videos), str(fast), 4, cases):
        for found in rank.values():
            check(found, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"module": {"compile": True}}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}]
)
def test_two_ranks_train_as_one_process_in_other_ways(videos: Path, fast: Path, change: dict[str, Any]) -> None:
    case = {"steps": STEPS, "module": {"optimizer": ADAMW} | change.get("module", {})} | {
        key: value for key, value in change.items() if key != "module"
    }
    one = train(str(videos), str(fast), 1, **case)
    for rank in on_ranks(2, several, str(videos), str(fast), 2, {"case": case}):
        check(rank["case"], one, 2e-2 if "precision" in change else 1e-5)
