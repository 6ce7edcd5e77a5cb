"""What a training begins with: 1. the checkpoint that is resumed, 2. `init_from`, 3. random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning import Pi05Module, Pi05Policy
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.provenance import Provenance
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot import lerobot_tensors
from pi05_lightning.weights.safetensors import save_tensors
from tests.both_stages import POSTTRAIN_STEPS, PRETRAIN_STEPS
from tests.untrained import untrained_model
from tests.weights.hub_cache import hold_in_cache

TOTAL = PRETRAIN_STEPS + POSTTRAIN_STEPS
Train = Callable[..., Trainer]


class Begin(Callback):
    """The weights before the first step."""

    weights: dict[str, torch.Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: x.clone() for name, x in pl_module.model.state_dict().items()}

    def equal(self, other: dict[str, Any]) -> bool:
        return self.weights.keys() == other.keys() and all(torch.equal(self.weights[k], x) for k, x in other.items())


@pytest.fixture
def model() -> Pi05:
    return untrained_model(seed=7)


@pytest.mark.parametrize("kind", ["ours", "lerobot", "openpi"])
def test_weights_and_dimensions_come_from_a_folder(train: Train, tmp_path: Path, model: Pi05, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "ours":
        save(folder, model)
    else:
        folder.mkdir()
        tensors = lerobot_tensors(model.state_dict(), {})
        prefix = "model." if kind == "openpi" else ""
        save_tensors(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
        )
    start = Begin()
    # the horizon is in no tensor, and the data's are shorter than π0.5's 50
    config = None if kind == "ours" else model.config
    train(start, module_options={"config": config, "init_from": str(folder)}, max_steps=1)
    assert start.equal(model.state_dict())


def test_what_was_taken_for_what_no_file_says_is_told(tmp_path: Path, model: Pi05) -> None:
    save_tensors(lerobot_tensors(model.state_dict(), {}), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"taken as π0\.5's 50, unless told.*`pi05 convert --horizon`") as told:
        Pi05Module(None, init_from=str(tmp_path)).configure_model()
    assert any("SigLIP's heads are in neither file" in str(warning.message) for warning in told)


def test_where_a_file_keeps_its_tensors_changes_no_bit_of_a_run(train: Train, tmp_path: Path, model: Pi05) -> None:
    # MKL's product of one row rounds otherwise where a weight does not begin at a multiple of 16 bytes
    starts, ends = [], []
    for note in ("", "8 bytes."):
        folder = tmp_path / f"folder{len(note)}"
        save(folder, model)
        save_tensors(model.state_dict(), folder / "model.safetensors", {"note": note})
        starts.append(int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") % 16)
        options = {"config": None, "init_from": str(folder), "flow_draws": 1}
        trainer = train(module_options=options, data_options={"batch_size": 1})
        ends.append(trainer.lightning_module.model.state_dict())
    assert set(starts) == {0, 8}
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("kind", ["file", "run"])
def test_weights_come_from_a_checkpoint_averaged_if_it_has_an_average(train: Train, tmp_path: Path, kind: str) -> None:
    train(WeightAverage(0.9))
    file = tmp_path / f"step={TOTAL}.ckpt"
    expected = {name: x.clone() for name, x in Pi05Policy(file).model.state_dict().items()}
    start = Begin()
    path = str(file if kind == "file" else tmp_path)
    train(start, module_options={"config": None, "init_from": path}, max_steps=1)
    assert start.equal(expected)


def test_a_run_records_whether_its_weights_came_from_the_hub(
    train: Train, tmp_path: Path, model: Pi05, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "runs" / "base", model)
    hold_in_cache(tmp_path / "runs" / "base", tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def recorded(name: str, steps: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        train(Provenance(), module_options={"init_from": name}, max_steps=steps, ckpt_path=ckpt_path)
        return json.loads((tmp_path / "provenance.json").read_text())["hub"]

    assert recorded("runs/base", 1) == {"init_from": None, "data": {}}
    (tmp_path / "step=1.ckpt").unlink()
    assert recorded("lab/arm", 1) == {"init_from": "lab/arm", "data": {}}
    save(tmp_path / "lab" / "arm", model)
    assert recorded("lab/arm", 2, tmp_path / "step=1.ckpt") == {"init_from": "lab/arm", "data": {}}


def test_resuming_comes_first(train: Train, tmp_path: Path, model: Pi05) -> None:
    save(tmp_path / "other", model)
    train()
    start = Begin()
    file = tmp_path / "step=2.ckpt"
    train(start, ckpt_path=file, module_options={"config": model.config, "init_from": str(tmp_path / "other")})
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert start.equal({name.removeprefix("model."): x for name, x in saved.items()})


def test_weights_that_do_not_fit_are_refused_with_their_names(train: Train, tmp_path: Path, model: Pi05) -> None:
    save(tmp_path / "other", model)
    wider = replace(model.config, action_dim=7)
    with pytest.raises(ValueError, match=re.escape("misshaped: flow_head.action_in_proj.weight")):
        train(module_options={"config": wider, "init_from": str(tmp_path / "other")}, max_steps=1)


def test_a_path_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a checkpoint nor a folder with one"):
        Pi05Module(init_from=str(tmp_path / "nowhere"))


def test_a_module_without_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give model\.config, or model\.init_from"):
        Pi05Module()
