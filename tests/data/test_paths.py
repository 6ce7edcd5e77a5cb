"""A dataset's folder may have any name: what is a pattern, a column or a protocol to a library is a name to us."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.types import Modality, Shapes

SHAPES = Shapes(image_size=32, horizon=4, action_dim=4, vocab_size=300, fast_vocab_size=32, fast_skip_tokens=0)
NAMES = ["[ab]*", "run?", "**", "day=3", "robot:1", "a::b", "zip::x", "{a,b}", "it's", "back\\slash", "50 %d #1"]


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_folder_that_is_named(pictures: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(pictures, tmp_path / name)
    for neighbour in ("a", "run1"):  # which the name matches as a pattern
        (tmp_path / neighbour / "data" / "chunk-000").mkdir(parents=True)
        (tmp_path / neighbour / "data" / "chunk-000" / "file-000.parquet").write_text("something else")
    (_, found), (_, expected) = (
        LeRobotConfig(path=str(root), cameras={}).open("robot", "train", SHAPES).statistics()
        for root in (tmp_path / name, pictures)
    )
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.count, expected.count)


@pytest.mark.parametrize("image_cache", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_videos_are_read_from_a_folder_of_any_name(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, image_cache: bool
) -> None:
    shutil.copytree(videos, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # a relative path may begin with what looks like a protocol
    config = {"image_cache": image_cache, "val_fraction": 0}
    found, expected = (
        LeRobotConfig(path=path, **config).open("robot", "train", SHAPES) for path in (name, str(videos))
    )
    for source in (found, expected):
        source.prepare()
    for camera, image in expected[5].images.items():
        np.testing.assert_array_equal(found[5].images[camera], image)


@pytest.mark.parametrize("name", NAMES)
def test_captions_are_read_from_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    (folder / "rows.jsonl").write_text(json.dumps({"image": "0.png", "caption": "a dark room"}) + "\n")
    source = VisionTextConfig(path=str(folder), val_fraction=0).open("web", "train", SHAPES)
    assert len(source.indices(Modality.WEB_CAPTION)) == 1
