"""A run of the debug model through both stages, with two micro-batches per step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the processes import it too, whatever else is called `tests` there

from killable_fit import fit
from two_stages import write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config"),
        videos,
        model={"flow_draws": 2},
        data={"batch_size": 4, "length_window": 2},
        pretrain={"warmup_steps": 2},
        callbacks=["killable_fit.Record"],
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Callable[..., Path]:
    """The run that nobody kills, by number of ranks and strategy."""
    runs: dict[tuple[int, str], Path] = {}

    def get(ranks: int, strategy: str = "ddp") -> Path:
        if (ranks, strategy) not in runs:
            run = runs[ranks, strategy] = tmp_path_factory.mktemp("whole") / "run"
            log, args = run.parent / "log", ["-c", str(config), "--run", str(run), "--data.num_workers", "0"]
            assert fit(args, log, ranks, strategy) == [0] * ranks, log.read_text()
        return runs[ranks, strategy]

    return get
