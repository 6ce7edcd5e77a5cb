"""Checkpoints of adapters: they leave out the base, which is found by its content or missed by it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy, StageSwitch
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.weights.adapter_base import AdapterBase, place_of
from pi05_lightning.weights.adapters import merge
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate
from tests.quiet_trainer import quiet_trainer
from tests.untrained import untrained_weights
from tests.weights.hub_cache import COMMIT, hold_in_cache

LORA = Lora(rank=2)
STEPS = 4
Fit = Callable[..., Trainer]


@pytest.fixture(scope="module")
def dataset(videos: Path) -> LeRobotConfig:
    return LeRobotConfig(path=str(videos), val_fraction=0.2)


@pytest.fixture
def fit(dataset: LeRobotConfig, tmp_path: Path) -> Fit:
    """A run under tmp_path/project, beside weights to begin with."""
    untrained_weights(tmp_path / "project" / "start")

    def run(
        name: str = "run", ckpt_path: Path | None = None, steps: int = STEPS, precision: Any = None, **module: Any
    ) -> Trainer:
        seed_everything(0)
        losses = StageOptions(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0})
        options = {"init_from": str(tmp_path / "project" / "start"), "lora": LORA} | module
        adamw = partial(torch.optim.AdamW, lr=1e-3)
        trainer = quiet_trainer(
            StageSwitch(0, STEPS, posttrain=losses),
            RunCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=-1),
            WeightAverage(0.5),
            max_steps=steps,
            precision=precision,
            default_root_dir=tmp_path / "project" / name,
        )
        data = Pi05DataModule({"robot": dataset}, batch_size=4, num_workers=0)
        trainer.fit(Pi05Module(optimizer=adamw, **options), data, ckpt_path=ckpt_path)
        return trainer

    return run


def checkpoint(tmp_path: Path, name: str = f"step={STEPS}", project: str = "project", run: str = "run") -> Path:
    return tmp_path / project / run / "checkpoints" / f"{name}.ckpt"


def merged(trainer: Trainer, base: str | None = None) -> dict[str, Tensor]:
    module = trainer.lightning_module
    assert isinstance(module, Pi05Module)
    return merge(module.config, LORA, module.model.state_dict(), base)  # type: ignore[arg-type]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow_cases
@pytest.mark.parametrize("base", [None, "nf4", "int8"])
def test_what_is_trained_alone_is_saved_and_the_policy_is_whole(base: str | None, fit: Fit, tmp_path: Path) -> None:
    trainer = fit(base=base)
    content = torch.load(checkpoint(tmp_path), weights_only=True)
    held = {name.removeprefix("model.") for name in content["state_dict"]}
    trained = {name for name, p in trainer.lightning_module.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    assert held == trained == content["ema"].keys()
    assert content["pi05"]["adapter_base"]["place"] == str(tmp_path / "project" / "start")
    assert_equal(locate(checkpoint(tmp_path), averaged=False).tensors(), merged(trainer, base))
    Pi05Policy(checkpoint(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("base", [None, "nf4"])
def test_a_run_is_resumed_exactly(base: str | None, fit: Fit, tmp_path: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in fit(base=base).lightning_module.state_dict().items()}
    again = fit(base=base, ckpt_path=checkpoint(tmp_path, "step=2"))
    assert_equal(again.lightning_module.state_dict(), expected)  # type: ignore[arg-type]


def test_a_base_that_was_moved_with_the_run_is_found_and_another_place_can_be_said(fit: Fit, tmp_path: Path) -> None:
    expected = merged(fit())
    (tmp_path / "project").rename(tmp_path / "moved")
    path = checkpoint(tmp_path, project="moved")
    assert_equal(locate(path, averaged=False).tensors(), expected)

    (tmp_path / "moved" / "start").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}:\n.*start.*\n.*moved/start.*\n.*--base .*base="):
        locate(path).tensors()
    assert_equal(locate(path, averaged=False, base=tmp_path / "elsewhere").tensors(), expected)
    fit("other", ckpt_path=path, init_from=str(tmp_path / "elsewhere"), steps=STEPS)

    untrained_weights(tmp_path / "moved" / "start", seed=1)
    with pytest.raises(ValueError, match=r"moved/start has other weights: [0-9a-f]{64}"):
        locate(path).tensors()
    convert(source=path, target=tmp_path / "whole", base=str(tmp_path / "elsewhere"), averaged=False)
    assert_equal(locate(tmp_path / "whole").tensors(), expected)


def test_a_base_of_the_hub_is_found_again_though_its_repository_has_other_weights_by_then(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = hold_in_cache(untrained_weights(tmp_path / "base"), tmp_path / "hub", monkeypatch)
    expected = merged(fit(init_from="lab/arm"))
    saved = torch.load(checkpoint(tmp_path), weights_only=True)["pi05"]["adapter_base"]
    assert saved["place"] == f"lab/arm@{COMMIT}"
    untrained_weights(hub / COMMIT[::-1], seed=1)
    (hub.parent / "refs" / "main").write_text(COMMIT[::-1])
    for given in (None, "lab/arm"):
        assert_equal(locate(checkpoint(tmp_path), averaged=False, base=given).tensors(), expected)


def test_a_base_is_remembered_by_its_own_name_and_not_by_a_links_that_others_get(tmp_path: Path) -> None:
    folder = untrained_weights(tmp_path / "step=1.ckpt")  # as a sharded checkpoint is a folder
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    name = str(tmp_path / "last.ckpt")
    base = AdapterBase("sha", place_of(name, locate(name)), str(tmp_path), "float32")
    assert base.place == str(folder)
    assert base.is_at(name)
    untrained_weights(tmp_path / "step=2.ckpt")
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    assert not base.is_at(name)


@pytest.mark.slow_cases
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_run_computes_in_todays_precision_whatever_its_base_was_read_in(
    precision: Any, fit: Fit, tmp_path: Path
) -> None:
    other = {"32-true": "bf16-true", "bf16-true": "32-true"}[precision]
    fit(precision=other, steps=2)
    module = fit(ckpt_path=checkpoint(tmp_path, "step=2"), precision=precision).lightning_module
    expected = torch.float32 if precision == "32-true" else torch.bfloat16
    assert {parameter.dtype for parameter in module.parameters()} == {expected}


@pytest.mark.slow
def test_a_run_begins_with_a_checkpoint_of_adapters(fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit()
    assert "leave out their base" not in caplog.text
    second = fit("second", init_from=str(checkpoint(tmp_path)))
    assert f"leave out their base, {checkpoint(tmp_path)}, and cannot be opened without it" in caplog.text
    assert_equal(locate(checkpoint(tmp_path, run="second"), averaged=False).tensors(), merged(second))
    whole = fit("whole", init_from=str(checkpoint(tmp_path)), lora=None, steps=1)
    assert whole.global_step == 1


def test_what_was_trained_whole_and_is_frozen_today_stays(fit: Fit, tmp_path: Path) -> None:
    name = "model.backbone.layers.0.input_layernorm.weight"
    fit(steps=2, lora=Lora(rank=2, train=(*LORA.train, r"backbone\.layers\.0\.input_layernorm")))
    trained = torch.load(checkpoint(tmp_path, "step=2"), weights_only=True)["state_dict"][name]
    assert trained.any()
    fit(ckpt_path=checkpoint(tmp_path, "step=2"))
    assert torch.equal(torch.load(checkpoint(tmp_path), weights_only=True)["state_dict"][name], trained)


def test_adapters_beside_random_weights_are_saved_with_them(fit: Fit, tmp_path: Path) -> None:
    trainer = fit(init_from=None, config=ModelConfig.preset("debug"), steps=2)
    saved = torch.load(checkpoint(tmp_path, "step=2"), weights_only=True)
    assert saved["state_dict"].keys() == trainer.lightning_module.state_dict().keys()
    assert saved["pi05"]["adapter_base"] is None


def test_the_content_of_weights_is_their_names_types_shapes_and_values(tmp_path: Path) -> None:
    start = locate(untrained_weights(tmp_path / "start"))
    shutil.copytree(tmp_path / "start", tmp_path / "copy")
    assert re.fullmatch("[0-9a-f]{64}", start.content_hash())
    assert locate(tmp_path / "copy").content_hash() == start.content_hash()
    model = start.model()
    with torch.no_grad():
        model.backbone.norm.weight[3] += 1e-6
    save(tmp_path / "nearly", model)
    assert locate(tmp_path / "nearly").content_hash() != start.content_hash()
    save(tmp_path / "bf16", start.model(torch.bfloat16))
    assert locate(tmp_path / "bf16").content_hash() != start.content_hash()


def test_a_base_is_not_at_a_name_that_its_own_only_begins_with(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = AdapterBase("sha", str(tmp_path / "base2" / "checkpoints" / "last.ckpt"), str(tmp_path), "float32")
    assert not base.is_at(str(tmp_path / "base"))
    assert replace(base, place=str(tmp_path / "base" / "last.ckpt")).is_at(str(tmp_path / "base"))
    assert not replace(base, place="lab/arm2").is_at("lab/arm")
    for name, is_there in (("lab/arm", True), ("lab/arm@0123", True), ("lab/arm@v2", False)):
        assert replace(base, place="lab/arm@0123").is_at(name) is is_there
