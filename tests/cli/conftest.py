"""A run of the debug model on twenty captions: small enough to train through the command line in a test."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from pi05_lightning.cli.main import main

STEPS = 4


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images with captions, in one parquet file."""
    file = tmp_path_factory.mktemp("captions") / "train.parquet"
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(20)]
    texts = [f"a drawer with {number} handles" for number in range(20)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": images, "caption": texts}, features=features).to_parquet(file)
    return file


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, captions: Path) -> Path:
    """A configuration of `STEPS` steps on the captions."""
    source = {
        "class_path": "pi05_lightning.data.sources.vision_text.VisionTextConfig",
        "init_args": {"path": str(captions), "val_fraction": 0.3},
    }
    content = {
        "model": {"config": "debug"},
        "data": {"sources": {"web": source}, "batch_size": 2, "num_workers": 0},
        "stages": {"pretrain_steps": STEPS, "posttrain_steps": 0},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    }
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The directory of a run that `pi05 fit` brought to its end."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    main(["fit", "-c", str(config), "--run", str(run)])
    return run
