"""What the tests of sharded runs share: where the ranks' work is, a FAST tokenizer, and a run."""

import sys
from pathlib import Path

import pytest

# the processes import what is there too, whatever else is called `tests` where they are
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("sharding", "models", "resume")]

from two_stages import write_config


@pytest.fixture(scope="session")
def two_stages(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A configuration: through both stages, with two micro-batches per step and a frozen part."""
    return write_config(
        tmp_path_factory.mktemp("config"),
        videos,
        model={},
        data={"batch_size": 2, "length_window": 1, "num_workers": 0},
        pretrain={"freeze": ["vision"]},
        callbacks=["killable_fit.Record", "gathered.BeginsWith"],
    )
