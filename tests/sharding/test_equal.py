"""Runs of a sharded model come to what one process comes to: from its first weights to what it predicts at last."""

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
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot import lerobot_tensors
from pi05_lightning.weights.safetensors import save_tensors
from tests.untrained import untrained_model

# Adam's division blows up the rounding of a gradient that is 0 but for rounding, as those of keys' biases are
ADAMW = partial(torch.optim.AdamW, lr=1e-3, eps=1e-5)
WATCHED: dict[str, Any] = {
    "limit_val_batches": 1.0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 8,
    "predict": True,
}
CASES: dict[str, dict[str, Any]] = {
    "watched": {"steps": (10, 10), "module": {"num_steps": 2}, **WATCHED},
    "vision frozen at first": {"stages": two_stages(freeze=(r"backbone\.vision",)), "gradient_clip_val": 0.5},
    "accumulation": {
        "accumulate_grad_batches": 2,
        "module": {"activation_checkpointing": True, "flow_draws": 2, "rtc_max_delay": 3},
    },
    "adapters": {"module": {"lora": Lora(rank=4), "knowledge_insulation": True}},
    # few steps, as its rounding grows about sixfold with each: from 1e-6 in the first to 6e-4 in the sixth
    "keypoints": {
        "model": "tiny",
        "steps": (2, 1),
        "stages": two_stages(location=1),
        "module": {"optimizer": torch.optim.SGD},
    },
}
LOOSER = {"keypoints": 1e-4}  # a softmax over the image's places: with ddp, too
STARTS = ("ours", "lerobot", "adapters on ours")
STEPS = (3, 3)


def options(case: dict[str, Any]) -> dict[str, Any]:
    return {"steps": STEPS} | case | {"module": {"optimizer": ADAMW} | case.get("module", {})}


def norm(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


def check(ranks: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Equal to the bit at first, then but for rounding: each loss to 1e-6 of itself, all else by its norm."""
    for found in ranks:
        assert found["begin"].keys() == expected["begin"].keys()
        assert all(torch.equal(found["begin"][name], value) for name, value in expected["begin"].items())
        assert len(found["losses"]) == len(expected["losses"]) > 0
        for losses, then in zip(found["losses"], expected["losses"], strict=True):
            assert losses == pytest.approx(then, rel=tolerance / 10)
        pairs = [*zip(found["gradients"], expected["gradients"], strict=True)]
        for tensors, then in [*pairs, *((found[part], expected[part]) for part in ("weights", "average"))]:
            assert tensors.keys() == then.keys()
            assert norm({name: tensors[name] - value for name, value in then.items()}) <= tolerance * norm(then)
    for values, then in zip(ranks[0]["validated"], expected["validated"], strict=True):
        assert values == pytest.approx(then, rel=tolerance, abs=tolerance)
    chunks = {place: chunk for found in ranks for place, chunk in found["chunks"].items()}
    assert chunks.keys() == expected["chunks"].keys()
    for place, chunk in expected["chunks"].items():
        torch.testing.assert_close(chunks[place], chunk, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Options by the name of the run; those of STARTS take a step from weights on disk."""
    folder = tmp_path_factory.mktemp("weights")
    model = untrained_model(seed=7)
    save(folder / "ours", model)
    (folder / "lerobot").mkdir()
    save_tensors(lerobot_tensors(model.state_dict(), {}), folder / "lerobot" / "model.safetensors")
    modules: list[dict[str, Any]] = [
        {"init_from": str(folder / "ours")},
        {"init_from": str(folder / "lerobot")},
        {"init_from": str(folder / "ours"), "lora": Lora(rank=2)},
    ]
    starts = {name: {"steps": (0, 1), "module": module} for name, module in zip(STARTS, modules, strict=True)}
    return {name: options(case) for name, case in (CASES | starts).items()}


@pytest.fixture(scope="module")
def on_two_ranks(videos: Path, fast: Path, cases: dict[str, dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(2, several, str(videos), str(fast), 2, cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *STARTS])
def test_two_ranks_train_as_one_process(
    on_two_ranks: list[dict[str, dict[str, Any]]],
    cases: dict[str, dict[str, Any]],
    videos: Path,
    fast: Path,
    name: str,
) -> None:
    one = train(str(videos), str(fast), 1, **cases[name])
    check([rank[name] for rank in on_two_ranks], one, LOOSER.get(name, 1e-5))


@pytest.mark.slow
def test_four_ranks_train_as_one_process_with_replicas_too(videos: Path, fast: Path) -> None:
    plain = options(CASES["watched"])
    ranks = on_ranks(4, several, str(videos), str(fast), 4, {"1": plain, "2": plain | {"strategy": FSDP2(replicas=2)}})
    one = train(str(videos), str(fast), 1, **plain)
    for replicas in "12":
        check([rank[replicas] for rank in ranks], one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"module": {"compile": True}}, 1e-5),
        ({"strategy": FSDP2(offload=True), "gradient_clip_val": 0.5, **WATCHED}, 1e-5),
        ({"precision": "bf16-mixed"}, 2e-2),
        ({"precision": "bf16-mixed", "strategy": FSDP2(reduce_dtype="fp32")}, 2e-2),
        ({"precision": "bf16-true"}, 4e-2),  # losses to a tenth: 2^-8, which is as much as a bf16 weight is rounded by
    ],
    ids=["compiled", "offloaded", "bf16-mixed", "bf16-mixed summed in fp32", "bf16-true"],
)
def test_two_ranks_train_as_one_process_in_other_ways(
    videos: Path, fast: Path, change: dict[str, Any], tolerance: float
) -> None:
    case = options(change)
    ranks = on_ranks(2, several, str(videos), str(fast), 2, {"case": case}, patience=550)
    one = train(str(videos), str(fast), 1, **case | {"strategy": "auto"})
    check([rank["case"] for rank in ranks], one, tolerance)
