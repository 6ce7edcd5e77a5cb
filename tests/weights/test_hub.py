"""Hub ids in the place of folders; the Hub is its cache here, as it is to anyone without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pi05_lightning import Pi05Module, Pi05Policy
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.files.hub import local_folder
from pi05_lightning.weights.lerobot import lerobot_tensors
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.safetensors import save_tensors
from tests.untrained import untrained_model
from tests.weights.hub_cache import COMMIT, hold_in_cache


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LeRobot's weights and nothing else."""
    folder = tmp_path_factory.mktemp("lerobot")
    save_tensors(lerobot_tensors(untrained_model().state_dict(), {}), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cached(lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache holds the folder as `lab/arm`, there is no network, and nothing else is in the way."""
    hold_in_cache(lerobot, tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)


def test_policy_of_a_hub_id_is_that_of_the_folder(lerobot: Path) -> None:
    one, other = (Pi05Policy.from_pretrained(name, tokenizer="tiny") for name in (lerobot, "lab/arm"))
    images = {camera: torch.zeros(3, 9, 9) for camera in one.processor.cameras}
    observation = {"image": images, "state": torch.zeros(6), "task": "open"}
    noise = torch.zeros(one.model.config.horizon, one.model.config.action_dim)
    assert (one.predict_chunk(observation, noise) == other.predict_chunk(observation, noise)).all()


def test_training_begins_with_a_hub_ids_weights() -> None:
    module = Pi05Module(init_from="lab/arm")
    module.configure_model()
    assert module.model.backbone.embed_tokens.weight.device.type == "cpu"


def test_hub_id_is_converted(lerobot: Path, tmp_path: Path) -> None:
    convert(source=Path("lab/arm"), target=tmp_path / "ours", tokenizer="tiny")
    assert locate(tmp_path / "ours").config() == locate(lerobot).config()


@pytest.mark.parametrize("open", [Pi05Policy.from_pretrained, locate, TextTokenizer.load])
def test_what_the_hub_does_not_give_is_refused_by_name(open) -> None:
    with pytest.raises(ValueError, match="lab/leg") as error:
        open("lab/leg")
    assert "log in" in str(error.value)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_is_a_branch_a_tag_or_a_commit(lerobot: Path, revision: str) -> None:
    assert locate(f"lab/arm@{revision}").config() == locate(lerobot).config()
    with pytest.raises(ValueError, match="lab/arm@v7"):
        locate("lab/arm@v7")


@pytest.mark.parametrize("name", ["lab/arm", "lab/leg"])
def test_a_folder_here_comes_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "lab" / "arm").mkdir(parents=True)
    assert local_folder(name) == Path(name)
