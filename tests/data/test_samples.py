"""What is drawn from, padding of batches, and what becomes of samples that turn out bad when they are read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pi05_lightning import Pi05DataModule
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.mixture import Mixture
from pi05_lightning.data.samples import BadSampleCount, Samples
from pi05_lightning.data.sources.base import SourceConfig
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import Stage
from pi05_lightning.types import Drawn

BAD = (3, 4, 11)


def captions(folder: Path, count: int, bad: tuple[int, ...] = ()) -> str:
    """Images with captions, some of which are no images."""
    buffer = BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "png")
    images = [{"bytes": b"no image" if row in bad else buffer.getvalue(), "path": None} for row in range(count)]
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    texts = [f"caption {row}" for row in range(count)]
    datasets.Dataset.from_dict({"image": images, "caption": texts}, features=features).to_parquet(folder / "c.parquet")
    return str(folder / "c.parquet")


def samples(**sources: SourceConfig) -> Samples:
    data = Pi05DataModule(sources, shapes=ModelConfig.preset("debug").shapes)
    return Samples(data.sources("train"), data.processor, max_questions=8)


def web(path: str, **options: str) -> Samples:
    return samples(web=VisionTextConfig(path, val_fraction=0, **options))  # type: ignore[arg-type]


def test_bad_sample_is_an_error_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match=r"dataset 'web', row 3, image"):
        web(captions(tmp_path, 20, BAD))[0, 3, 0]


def test_skipped_sample_is_replaced_by_one_that_its_key_decides(tmp_path: Path) -> None:
    path = captions(tmp_path, 20, BAD)
    first, again, other = (web(path, on_bad_sample="skip")[0, 3, key] for key in (7, 7, 8))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    assert first.key == 7
    assert "row 3, image" in first.skipped[0]


def test_good_sample_is_not_replaced(tmp_path: Path) -> None:
    found = web(captions(tmp_path, 20, BAD), on_bad_sample="skip")
    assert found[0, 5, 7].skipped == ()


def test_source_without_a_good_sample_is_an_error_and_no_endless_search(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="16 samples in a row are bad"):
        web(captions(tmp_path, 8, tuple(range(8))), on_bad_sample="skip")[0, 3, 0]


def test_batch_knows_what_it_was_drawn_from(tmp_path: Path) -> None:
    found = web(captions(tmp_path, 20, BAD), on_bad_sample="skip")
    batch = found.collate([found[0, index, index] for index in (1, 2, 3)])
    assert batch.drawn is not None
    assert batch.drawn.names == {"web/web_caption": 3}
    assert batch.drawn.text_tokens == batch.token_mask.sum()
    assert len(batch.drawn.skipped) >= 1


def test_training_stops_when_the_share_of_bad_samples_passes_its_bound() -> None:
    count = BadSampleCount(max_share=0.01)
    good, bad = Drawn({"web/qa": 100}, 0), Drawn({"web/qa": 9}, 0, ("dataset 'web', row 3: broken",))
    for _ in range(9):
        count.add(bad)
    for _ in range(20):
        count.add(good)
    for _ in range(12):  # 21 of 2210
        count.add(bad)
    count.add(bad)
    with pytest.raises(ValueError, match=r"23 of the first 2230 .*max_bad_share 0\.01.*row 3: broken"):
        count.add(bad)


def test_a_share_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.max_bad_share is 2"):
        BadSampleCount(2)


@pytest.mark.parametrize("name", ["batch_size", "length_window", "val_samples", "num_workers"])
def test_wrong_number_is_named(name: str, pictures: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.{name} is -1"):
        Pi05DataModule({"robot": LeRobotConfig(str(pictures))}, **{name: -1})


@pytest.fixture(scope="module")
def mixed(pictures: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """One camera, three cameras, none, and captions."""
    folder = tmp_path_factory.mktemp("captions")
    three = {"observation.images.top": "top", "observation.images.wrist": "wrist"}
    return samples(
        one=LeRobotConfig(str(pictures)),
        two=LeRobotConfig(str(videos), cameras=three),
        none=LeRobotConfig(str(videos), cameras={}),
        web=VisionTextConfig(captions(folder, 60)),
    )


@pytest.mark.parametrize("image_tokens", [4, 256])
def test_padding_is_below_five_percent_on_a_mixture_of_cameras_and_text(mixed: Samples, image_tokens: int) -> None:
    mixture = Mixture(mixed.entries_with_lengths(), batch_size=4, window=64)
    weights = mixture.weights(Stage(mixture={name: 1 for name in mixed.names if "qa" not in name}))
    valid = positions = 0
    for k in range(24):
        batch = mixed.collate([mixed[draw] for draw in mixture.batch(k, weights)])
        valid += int(batch.image_mask.sum()) * image_tokens + int(batch.token_mask.sum())
        positions += batch.image_mask.numel() * image_tokens + batch.tokens.numel()
    assert 1 - valid / positions < 0.05
