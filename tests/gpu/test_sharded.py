"""A model that FSDP2 divides between all CUDA devices, though it be one: it trains as on a single device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_ranks import on_ranks
from sharded_runs import train

from pi05_lightning.training.sharding import FSDP2
from tests.both_stages import STAGES
from tests.untrained import untrained_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def run(dataset: Path, folder: Path, accelerator: str, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one device, and the first of `count` that divide the model, come to from the same weights."""
    # what is 0 but for rounding is no gradient to Adam, see tests/sharding/test_equal.py
    module = {"init_from": str(untrained_weights(folder)), "optimizer": partial(torch.optim.AdamW, lr=1e-3, eps=1e-5)}
    options = {"stages": STAGES, "steps": (3, 3), "module": module, "accelerator": accelerator}
    (one,) = on_ranks(1, partial(train, str(dataset), None, 1, batch_size=2 * count, **options))
    found = on_ranks(count, partial(train, str(dataset), None, count, FSDP2(), batch_size=2, **options))
    return one, found[0]


def test_sharded_over_all_devices_it_trains_as_on_one(videos: Path, tmp_path: Path) -> None:
    one, found = run(videos, tmp_path, "cuda", torch.cuda.device_count())
    assert len(one["losses"]) == len(found["losses"]) == 6
    for losses, expected in zip(found["losses"], one["losses"], strict=True):
        assert losses == pytest.approx(expected, rel=1e-3)
    assert found["norms"] == pytest.approx(one["norms"], rel=1e-3)
