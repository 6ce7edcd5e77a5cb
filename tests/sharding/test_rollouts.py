"""Rollouts of a sharded run: the first rank acts with the gathered average, the others wait, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded_ranks import on_ranks
from sharded_rollouts import roll_out

from pi05_lightning.sim.metaworld.collect import collect
from pi05_lightning.sim.metaworld.config import CollectConfig


@pytest.mark.slow
def test_a_sharded_run_rolls_out_what_one_process_does_and_trains_on(tmp_path: Path) -> None:
    small = {"episodes": 3, "val_episodes": 1, "scenes": 2, "num_workers": 1}
    data = CollectConfig(tmp_path / "data", tasks=("reach-v3", "drawer-open-v3"), **small)
    collected = str(collect(data))
    one = roll_out(collected, str(tmp_path / "one"), 1)
    first, second = on_ranks(2, roll_out, collected, str(tmp_path / "two"), 2)
    assert not second["acted"]
    assert first["films"] == one["films"] == ["step-00000002.mp4"]
    for part in ("acted", "weights"):
        for name, value in one[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
