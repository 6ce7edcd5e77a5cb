"""No rank of a sharded run ever has the whole model, nor reads the whole of its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from killable_fit import fit
from sharded_memory import LARGE, taken, taken_to_open
from sharded_ranks import on_ranks

from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.folder import save
from tests.untrained import untrained_model

RANKS = 4


@pytest.mark.slow
def test_a_rank_makes_its_part_in_less_memory_than_the_whole_takes(videos: Path, fast: Path, tmp_path: Path) -> None:
    model = untrained_model(LARGE)
    save(tmp_path / "weights", model)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    data = str(videos), str(fast), RANKS
    for at_random in on_ranks(RANKS, taken, *data, None):
        assert 1 / RANKS < at_random / whole < 0.6
    for from_file in on_ranks(RANKS, taken, *data, str(tmp_path / "weights")):
        assert 1 / RANKS < from_file / whole < 0.75  # the slice itself, and its pages of the file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, two_stages: Path) -> tuple[Path, Path]:
    """Of two ranks each, with averaged weights: a large one, and one by which everything is imported."""
    folder = tmp_path_factory.mktemp("runs")
    content = yaml.safe_load(two_stages.read_text())
    content["model"]["config"] = LARGE.to_dict()
    (folder / "large.yaml").write_text(yaml.safe_dump(content))
    for name, config in (("large", folder / "large.yaml"), ("small", two_stages)):
        args = ["-c", str(config), "--run", str(folder / name)]
        args += ["--stages.pretrain_steps", "0", "--stages.posttrain_steps", "1"]
        assert fit(args, folder / "log", 2, "fsdp2") == [0, 0], (folder / "log").read_text()
    return folder / "large", folder / "small"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["policy", "validate", "convert"])
def test_one_process_opens_a_sharded_run_in_its_size(runs: tuple[Path, Path], how: str, tmp_path: Path) -> None:
    (found,) = on_ranks(1, taken_to_open, how, *map(str, runs), str(tmp_path))
    size = sum(tensor.numel() * 4 for tensor in Pi05(LARGE).state_dict().values())
    assert 0.9 < found / size < 1.2


@pytest.mark.slow
def test_ranks_begin_with_a_sharded_run_in_less_memory_than_the_whole_takes(
    runs: tuple[Path, Path], videos: Path, fast: Path
) -> None:
    whole = sum(tensor.numel() * 4 for tensor in Pi05(LARGE).state_dict().values())
    for found in on_ranks(RANKS, taken, str(videos), str(fast), RANKS, str(runs[0])):
        assert 1 / RANKS < found / whole < 0.75
