"""A run of the debug model through both stages, with two micro-batches per step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))  # the processes import it too, whatever else is called `tests` there

from killable_fit import fit

PRETRAIN_STEPS, POSTTRAIN_STEPS, ACCUMULATE = 3, 4, 2


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    robot = {
        "class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig",
        "init_args": {"path": str(videos), "val_fraction": 0.2},
    }
    content = {
        "model": {
            "config": "debug",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
            "flow_draws": 2,
        },
        "data": {"sources": {"robot": robot}, "batch_size": 4, "length_window": 2},
        "stages": {
            "pretrain_steps": PRETRAIN_STEPS,
            "posttrain_steps": POSTTRAIN_STEPS,
            "pretrain": {
                "losses": {"text": 1, "subtask": 1},
                "mixture": {"robot/qa": 0.5, "robot/hl_subtask": 0.5},
                "warmup_steps": 2,
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
            "accumulate_grad_batches": ACCUMULATE,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "killable_fit.Record"}],
        },
    }
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


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
