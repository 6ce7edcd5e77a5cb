"""Datasets on the Hub, which is a server on this machine here: whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from huggingface_hub import RepoCard
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from pi05_lightning.cli.main import main
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.files.local import write_json
from pi05_lightning.types import Shapes

from .loopback_hub import Hub

DATA = "datasets/lab/drawers"


def test_dataset_whose_tag_failed_is_said_to_be_there(hub: Hub, pictures: Path) -> None:
    hub.refuse_tags = True
    with pytest.raises(SystemExit, match=r"the files are at .*, but the tag v3\.0, .* is not"):
        main(["push", str(pictures), "lab/drawers"])
    hub.refuse_tags = False
    main(["push", str(pictures), "lab/drawers"])
    assert hub.tags[DATA] == {"v3.0"}


def test_licence_is_put_into_a_datasets_own_card(
    hub: Hub, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "robot"))
    theirs = "---\nlicense: mit\n---\n\n# Drawers\n"
    (source / "README.md").write_text(theirs)
    main(["push", str(source), "lab/drawers"])
    assert hub.repositories[DATA]["README.md"].decode() == theirs
    main(["push", str(source), "lab/drawers", "--license", "cc-by-4.0"])
    assert "No licence is stated" not in capsys.readouterr().out
    pushed = hub.repositories[DATA]["README.md"].decode()
    assert "license: cc-by-4.0" in pushed
    assert "# Drawers" in pushed
    assert (source / "README.md").read_text() == theirs
    with pytest.raises(SystemExit, match="--robot is for policies"):
        main(["push", str(source), "lab/drawers", "--robot", "arm"])


def test_recorded_dataset_goes_whole_under_lerobots_tag(hub: Hub, pictures: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "robot"))
    (source / ".cache").mkdir()
    (source / ".cache" / "frames").write_text("a cache")
    write_json(source / "meta" / "pi05_outcomes.json", {"0": {"success": True, "frames": 12}})
    write_json(
        source / "meta" / "pi05_collect.json", {"policy": "/secret/place/fit", "env": "Kitchen(scene='/secret/x.xml')"}
    )
    for _ in range(2):
        main(["push", str(source), "lab/drawers", "--license", "cc-by-4.0"])
    files = hub.repositories[DATA]
    names = {str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.is_file()}
    said = {"meta/pi05_outcomes.json", "meta/pi05_collect.json"}
    assert set(files) == names | said | {"README.md"}
    assert json.loads(files["meta/pi05_collect.json"]) == {"policy": "fit", "env": "Kitchen(scene='x.xml')"}
    assert json.loads((source / "meta" / "pi05_collect.json").read_text())["policy"] == "/secret/place/fit"
    assert all(files[name] == (pictures / name).read_bytes() for name in names)
    assert hub.tags[DATA] == {"v3.0"}
    card = files["README.md"].decode()
    assert "license: cc-by-4.0" in card
    assert "**License:** cc-by-4.0" in card


def test_lerobot_pushes_a_dataset_whose_frames_are_cached(
    hub: Hub, pictures_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RepoCard, "push_to_hub", lambda *_, **__: None)  # it asks the true Hub
    shapes = Shapes(32, horizon=4, action_dim=4, vocab_size=300, fast_vocab_size=32, fast_skip_tokens=0)
    LeRobotConfig(str(pictures_copy), image_cache=True).open("robot", "train", shapes).prepare()
    LeRobotDataset("lab/drawers", root=pictures_copy).push_to_hub(tag_version=False)
    names = {str(path.relative_to(pictures_copy)) for path in pictures_copy.rglob("*") if path.is_file()}
    assert hub.repositories[DATA].keys() == names


def test_videos_of_an_earlier_push_go_where_there_are_none_now(hub: Hub, pictures: Path) -> None:
    main(["push", str(pictures), "lab/drawers"])
    files = set(hub.repositories[DATA])
    assert not any(name.startswith("videos/") for name in files)
    hub.repositories[DATA] |= {"videos/top/chunk-000/file-000.mp4": b"old", "theirs.md": b"kept"}
    main(["push", str(pictures), "lab/drawers"])
    assert set(hub.repositories[DATA]) == files | {"theirs.md"}


def test_images_with_text_go_as_parquet(hub: Hub, tmp_path: Path) -> None:
    rows = {"image": [Image.new("RGB", (8, 8))] * 3, "caption": ["one", "two", "three"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(tmp_path / "web")
    main(["push", str(tmp_path / "web"), "lab/drawers"])
    file = tmp_path / "back.parquet"
    file.write_bytes(hub.repositories[DATA]["data/train-00000-of-00001.parquet"])
    back = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "read"))["train"]
    assert back["caption"][:] == rows["caption"]
    assert back[0]["image"].size == (8, 8)


def test_collects_folder_of_two_datasets_is_refused(hub: Hub, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data" / "robot")
    with pytest.raises(SystemExit, match="holds two datasets"):
        main(["push", str(tmp_path / "data"), "lab/drawers"])
