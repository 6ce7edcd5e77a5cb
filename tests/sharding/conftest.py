"""What the tests of sharded runs share: where the ranks' work is, a FAST tokenizer, and a run."""

import sys
from pathlib import Path

import pytest
import yaml

# the processes import what is there too, whatever else is called `tests` where they are
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("sharding", "models", "resume")]


@pytest.fixture(scope="session")
def two_stages(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A configuration: through both stages, with two micro-batches per step and a frozen part."""
    robot = {
        "class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig",
        "init_args": {"path": str(videos), "val_fraction": 0.2},
    }
    content = {
        "model": {
            "config": "debug",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        },
        "data": {"sources": {"robot": robot}, "batch_size": 2, "length_window": 1, "num_workers": 0},
        "stages": {
            "pretrain_steps": 3,
            "posttrain_steps": 4,
            "pretrain": {
                "losses": {"text": 1, "subtask": 1},
                "mixture": {"robot/qa": 0.5, "robot/hl_subtask": 0.5},
                "freeze": ["vision"],
            },
            "posttrain": {
                "losses": {"subtask": 1, "flow": 1},
                "mixture": {"robot/continuous_robot_actions": 0.7, "robot/hl_subtask": 0.3},
            },
        },
        "ema": {"decay": 0.9},
        "checkpoint": {"every_n_train_steps": 1},
        "trainer": {
            "accelerator": "cpu",
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "killable_fit.Record"}, {"class_path": "gathered.BeginsWith"}],
        },
    }
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
