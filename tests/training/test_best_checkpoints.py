"""Checkpoints by score: of exactly the weights in the file, beside a `last.ckpt` that is always the newest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.weights.training_checkpoint import find_checkpoint

VALIDATE = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
FEW = {"data_options": {"val_samples": 2}, "module_options": {"num_steps": 1}}


class Score(Callback):
    """Logs `score`: what a test says by the step, or a number that the weights alone decide; stops where it is told."""

    def __init__(self, scores: dict[int, float] | None = None, stop_after: int | None = None) -> None:
        self.scores, self.stop_after = scores, stop_after

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = of_weights(pl_module.state_dict())
        pl_module.log("score", own if self.scores is None else self.scores.get(trainer.global_step, 0.0))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.stop_after:
            raise RuntimeError("stopped")


def of_weights(state: dict[str, Tensor]) -> float:
    return float(state["model.backbone.embed_tokens.weight"].float().abs().sum())


def saved(folder: Path) -> dict[str, Any]:
    return {
        file.name: torch.load(file, weights_only=True)
        for file in sorted(folder.glob("*.ckpt"))
        if not file.is_symlink()
    }


def run_checkpoint(folder: Path, **options: Any) -> RunCheckpoint:
    given = {"filename": "{step}-{score:.3f}", "monitor": "score", "every_n_train_steps": 1, "save_last": "link"}
    return RunCheckpoint(
        dirpath=folder, **(given | {"auto_insert_metric_name": False, "enable_version_counter": False} | options)
    )


def test_score_is_of_a_validation_of_exactly_these_weights(train: Callable[..., Trainer], tmp_path: Path) -> None:
    best = run_checkpoint(tmp_path / "best", save_top_k=-1)
    train(Score(), best, **VALIDATE, **FEW)
    found = {name: file for name, file in saved(tmp_path / "best").items() if name != "last.ckpt"}
    assert [file["global_step"] for file in found.values()] == [2, 4, 6]
    for name, file in found.items():
        score = of_weights(file["state_dict"])
        assert name == f"{file['global_step']}-{score:.3f}.ckpt"
        assert float(best.best_k_models[str(tmp_path / "best" / name)]) == pytest.approx(score)


@pytest.mark.slow_cases
@pytest.mark.parametrize("save_last", ["link", True])
@pytest.mark.parametrize("save_top_k", [1, 3, -1, 0])
def test_last_is_the_newest_after_every_step_whatever_the_scores(
    train: Callable[..., Trainer], tmp_path: Path, save_top_k: int, save_last: Any
) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step:
                last = torch.load(tmp_path / "best" / "last.ckpt", weights_only=True)
                seen.append((trainer.global_step, last["global_step"]))

    worse = {2: 1.0, 4: 2.0, 6: 3.0}
    train(
        Look(),
        Score(worse),
        run_checkpoint(tmp_path / "best", save_top_k=save_top_k, save_last=save_last),
        **VALIDATE,
        **FEW,
    )
    assert seen == [(step, step) for step in range(1, 6)]
    assert torch.load(tmp_path / "best" / "last.ckpt", weights_only=True)["global_step"] == 6
    kept = {name.split("-")[0] for name in saved(tmp_path / "best")} - {"last.ckpt"}
    assert kept == {1: {"2"}, 3: {"2", "4", "6"}, -1: {"2", "4", "6"}, 0: set()}[save_top_k]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [
        ("min", (3.0, 1.0, 2.0), "4-1.000.ckpt"),
        ("max", (1.0, 3.0, 2.0), "4-3.000.ckpt"),
        ("min", (float("nan"), 5.0, float("nan")), "4-5.000.ckpt"),
        ("max", (float("nan"), 5.0, float("nan")), "4-5.000.ckpt"),
    ],
)
def test_best_is_the_best_and_never_nan(
    train: Callable[..., Trainer], tmp_path: Path, mode: str, scores: tuple[float, ...], kept: str
) -> None:
    best = run_checkpoint(tmp_path / "best", mode=mode)
    train(Score(dict(zip((2, 4, 6), scores, strict=True))), best, **VALIDATE, **FEW)
    assert sorted(saved(tmp_path / "best")) == [kept, "last.ckpt"]
    assert best.best_model_path == str(tmp_path / "best" / kept)


def test_validations_between_the_regular_checkpoints_are_scored_too(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    best = run_checkpoint(tmp_path / "best", save_top_k=-1, every_n_train_steps=5)
    train(Score({2: 1, 4: 2, 6: 3}), best, **VALIDATE, **FEW)
    assert sorted(saved(tmp_path / "best")) == ["2-1.000.ckpt", "4-2.000.ckpt", "6-3.000.ckpt"]


def test_weights_that_were_not_validated_have_no_score_in_their_name(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    train(Score({2: 1, 4: 2, 6: 3}), run_checkpoint(tmp_path / "all", monitor=None, save_top_k=-1), **VALIDATE, **FEW)
    names = ["1-nan", "2-1.000", "3-nan", "4-2.000", "5-nan", "6-3.000"]
    assert sorted(saved(tmp_path / "all")) == [f"{name}.ckpt" for name in names]


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("key", ["val/robot/continuous_robot_actions/flow_los", "val_loss", "loss"])
def test_monitor_that_no_validation_logs_is_refused_before_the_first_step(
    train: Callable[..., Trainer], tmp_path: Path, key: str, sanity: int
) -> None:
    score = Score()
    with pytest.raises(ValueError, match=rf"checkpoint.monitor is {key}.*continuous_robot_actions/flow_loss"):
        train(score, run_checkpoint(tmp_path / "best", monitor=key), **(VALIDATE | {"num_sanity_val_steps": sanity}))
    assert not saved(tmp_path)


def test_monitor_in_a_run_without_validation_is_refused(train: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is validated"):
        train(run_checkpoint(tmp_path / "best", monitor="val/robot/continuous_robot_actions/flow_loss"))


def test_monitor_in_a_run_that_ends_before_its_first_validation_is_refused(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    late = VALIDATE | {"check_val_every_n_epoch": None, "val_check_interval": 10_000}
    with pytest.raises(ValueError, match=r"a trainer.val_check_interval beyond its \d+ batches"):
        train(run_checkpoint(tmp_path / "best", monitor="val/robot/continuous_robot_actions/flow_loss"), **late)


def test_every_metric_that_validation_logs_is_known_before(train: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = train(**VALIDATE)
    logged = {name for name in trainer.callback_metrics if name.startswith("val")}
    assert logged <= set(trainer.lightning_module.validation_metrics())  # type: ignore[operator]


@pytest.mark.slow_cases
@pytest.mark.parametrize("moved", [False, True])
def test_best_ones_survive_a_resume_and_a_moved_directory(
    train: Callable[..., Trainer], tmp_path: Path, moved: bool
) -> None:
    scores = {2: 1.0, 4: 3.0, 6: 2.0}
    folder = tmp_path / "best"
    with pytest.raises(RuntimeError, match="stopped"):
        train(Score(scores, stop_after=5), run_checkpoint(folder, save_top_k=2), **VALIDATE, **FEW)
    if moved:
        folder = Path(shutil.move(folder, tmp_path / "elsewhere"))
    best = run_checkpoint(folder, save_top_k=2)
    train(Score(scores), best, ckpt_path=folder / "last.ckpt", **VALIDATE, **FEW)
    assert sorted(saved(folder)) == ["2-1.000.ckpt", "6-2.000.ckpt"]
    assert best.best_model_path == str(folder / "2-1.000.ckpt")
    assert {Path(path).name: float(score) for path, score in best.best_k_models.items()} == {
        "2-1.000.ckpt": 1.0,
        "6-2.000.ckpt": 2.0,
    }


def test_newest_is_the_last_one_though_the_clock_was_set_back(
    train: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(2_000_000_000, -60)
    monkeypatch.setattr("pi05_lightning.module.checkpoint.time", SimpleNamespace(time=lambda: next(clock)))
    train(max_steps=3)
    assert find_checkpoint(tmp_path) == tmp_path / "step=3.ckpt"
    train(max_steps=5, ckpt_path=tmp_path / "step=3.ckpt")
    assert find_checkpoint(tmp_path) == tmp_path / "step=5.ckpt"


def test_two_of_them_keep_their_own_files(train: Callable[..., Trainer], tmp_path: Path) -> None:
    folder = tmp_path / "both"
    regular = run_checkpoint(folder, monitor=None, filename="{step:08d}")
    best = run_checkpoint(folder, filename="best-{step}", save_last=None)
    train(Score({2: 1.0, 4: 3.0, 6: 2.0}), regular, best, **VALIDATE, **FEW)
    assert sorted(saved(folder)) == ["00000006.ckpt", "best-2.ckpt"]
    assert (folder / "last.ckpt").resolve().name == "00000006.ckpt"


def test_two_of_them_that_would_remove_each_others_files_are_refused(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a `filename` or a `dirpath` of its own"):
        train(Score(), run_checkpoint(tmp_path), run_checkpoint(tmp_path, mode="max"), **VALIDATE, **FEW)
