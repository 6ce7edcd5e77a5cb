"""Training checkpoints and folders as policies open them: nothing else is read, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_not_run(write, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write({"pi05": {}, "state_dict": {}, "callbacks": Harmful(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt is truncated, or no checkpoint of tensors and plain types"):
        locate(path).processor()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_truncated_checkpoint_is_refused_by_name(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"pi05": {}, "state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        locate(tmp_path).processor()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="no `pi05` entry"):
        locate(tmp_path).processor()


def test_a_run_one_level_down_is_meant(tmp_path: Path) -> None:
    (tmp_path / "demo" / "fit").mkdir(parents=True)
    torch.save({"state_dict": {}}, tmp_path / "demo" / "fit" / "last.ckpt")
    with pytest.raises(ValueError, match=r"neither a checkpoint .* \(did you mean .*demo/fit\?\)"):
        locate(tmp_path / "demo")


@pytest.mark.parametrize("at", [".", "checkpoints", "checkpoints/last"])
def test_the_weights_of_lerobots_training_are_meant(tmp_path: Path, at: str) -> None:
    for step in ("000100", "000200"):
        (tmp_path / "checkpoints" / step / "pretrained_model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").symlink_to("000200")
    with pytest.raises(ValueError, match=r"\(did you mean .*/checkpoints/last/pretrained_model\?\)"):
        locate(tmp_path / at)


def test_weights_that_were_read_stay_when_another_file_is_written_over_theirs(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"pi05": {}, "state_dict": {"model.weight": torch.ones(1000)}}, path)
    weights = locate(path)
    kept, mapped = weights.tensors()["weight"], weights.mapped_tensors()["weight"]
    torch.save({"pi05": {}, "state_dict": {"model.weight": torch.zeros(1000)}}, tmp_path / "next.ckpt")
    with path.open("r+b") as file:  # as cp does
        file.write((tmp_path / "next.ckpt").read_bytes())
    assert torch.equal(kept, torch.ones(1000))
    assert not torch.equal(mapped, kept)


def test_weights_without_a_processor_say_what_is_missing(tmp_path: Path) -> None:
    save(tmp_path, Pi05(ModelConfig.preset("debug")))
    with pytest.raises(ValueError, match=r"no processor\.json.*--tokenizer"):
        locate(tmp_path).processor()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_file_of_a_folder_of_weights_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name} is one file of a folder of weights: name its folder, {tmp_path}$"):
        locate(tmp_path / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "policy.pth"])
def test_a_folder_of_pickled_weights_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"type": "pi05"}')
    torch.save({"weight": Harmful(tmp_path / "made")}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"only pickled weights \({name}\), which are not read"):
        locate(tmp_path).processor()
    assert not (tmp_path / "made").exists()
