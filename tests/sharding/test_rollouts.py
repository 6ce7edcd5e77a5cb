"""Rollouts in a sharded run, where the first rank acts with the gathered average and the others wait; and of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_ranks import on_ranks
from sharded_rollouts import roll_out

from pi05_lightning.cli.rollout import rollout
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.weights.sharded_checkpoint import is_sharded, read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> str:
    small = {"episodes": 3, "val_episodes": 1, "scenes": 2, "num_workers": 1}
    folder = tmp_path_factory.mktemp("collected")
    return str(collect(CollectConfig(folder / "data", tasks=("reach-v3", "drawer-open-v3"), **small)))


@pytest.fixture(scope="module")
def two(collected: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The run of two ranks, and what each of them says of it."""
    run = tmp_path_factory.mktemp("two")
    return run, on_ranks(2, roll_out, collected, str(run), 2)


def test_a_sharded_run_rolls_out_what_one_process_does_and_trains_on(
    collected: str, two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    one, (first, second) = roll_out(collected, str(tmp_path), 1), two[1]
    assert not second["acted"]
    assert first["films"] == one["films"] == ["step-00000002.mp4"]
    for part in ("acted", "weights"):
        for name, value in one[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")


def test_it_is_rolled_out_afterwards_as_a_file(two: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    sharded, file = two[0] / "checkpoints" / "last.ckpt", tmp_path / "file.ckpt"
    assert is_sharded(sharded)
    torch.save(read(sharded), file)
    options: dict[str, Any] = {"tasks": ["reach-v3"], "episodes": 1, "max_seconds": 0.3, "num_workers": 1}
    found, expected = (
        rollout(path, out=tmp_path / name, **options) for name, path in {"sharded": sharded, "of-file": file}.items()
    )
    assert found["success"] == expected["success"]
    films = sorted(film.name for film in (tmp_path / "sharded").glob("*.mp4"))
    assert films == ["policy-reach-v3-2000000.mp4"]
    for film in films:
        assert (tmp_path / "sharded" / film).read_bytes() == (tmp_path / "of-file" / film).read_bytes()
