"""What is drawn from, padding of batches, and what becomes of samples that turn out bad when they are read."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from pi05_lightning import Pi05DataModule, Pi05Module
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.samples import BadSampleCount, Samples
from pi05_lightning.data.sources.base import SourceConfig
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, Recipe, StageOptions
from pi05_lightning.training.callbacks.examples import ValidationExamples
from pi05_lightning.types import Drawn, Modality
from tests.quiet_trainer import quiet_trainer

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
    return Samples(data.sources("train"), data.processor, max_questions=8, training=True)


def web(path: str, **options: str) -> Samples:
    return samples(web=VisionTextConfig(path, val_fraction=0, **options))  # type: ignore[arg-type]


def test_more_cameras_than_the_model_has_parameters_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wrist").mkdir()
    views = {
        name: VisionTextConfig(captions(folder, 4), camera=name, val_fraction=0)
        for name, folder in (("top", tmp_path), ("wrist", tmp_path / "wrist"))
    }
    shapes = ModelConfig.preset("tiny").shapes
    assert Pi05DataModule(views, shapes=shapes).processor.cameras == ("top", "wrist")
    assert Pi05DataModule(views, shapes=shapes, cameras=["wrist"]).processor.cameras == ("wrist", "top")
    with pytest.raises(ValueError, match=r"\['top', 'wrist'\] but the model was made for 1 at most: .*max_cameras"):
        _ = Pi05DataModule(views, shapes=replace(shapes, max_cameras=1)).processor


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


def test_validation_leaves_bad_samples_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = captions(tmp_path, 20, tuple(range(0, 20, 2)))
    web = VisionTextConfig(path, val_fraction=0.5, on_bad_sample="skip")
    data = Pi05DataModule({"web": web}, batch_size=1, num_workers=0)
    module = Pi05Module(ModelConfig.preset("debug"))
    with caplog.at_level("WARNING"):
        trainer = quiet_trainer(ValidationExamples(), limit_val_batches=1.0, default_root_dir=tmp_path)
        trainer.validate(module, data, verbose=False)
    bad, good = caplog.text.count("left out of what is measured: "), module.results["web/web_caption"]["samples"]
    assert bad > 0
    assert good > 0
    assert bad + good == len(data.sources("val")["web"].indices(Modality.WEB_CAPTION))


def test_validation_samples_are_made_as_those_of_the_weights_that_are_measured(pictures: Path) -> None:
    data = Pi05DataModule(
        {"robot": LeRobotConfig(str(pictures), val_fraction=0.2)}, shapes=ModelConfig.preset("debug").shapes
    )
    own = data.validation.processor
    weights = Processor.from_dict(own.to_dict())
    data.measure_with(weights)
    assert data.validation.processor is data.processor is not own
    assert data.processor.robots is weights.robots


def test_data_without_a_validation_part_have_nothing_to_validate(pictures: Path) -> None:
    robot = LeRobotConfig(str(pictures), val_fraction=0)
    assert Pi05DataModule({"robot": robot}, shapes=ModelConfig.preset("debug").shapes).val_dataloader() == []


def test_training_stops_when_the_share_of_bad_samples_passes_its_bound() -> None:
    count = BadSampleCount(max_share=0.01)
    good, bad = Drawn({"web/qa": 100}, 0), Drawn({"web/qa": 9}, 0, ("dataset 'web', row 3: broken",))
    for _ in range(20):
        count.add(good)
    for _ in range(22):  # of 2220
        count.add(bad)
    with pytest.raises(ValueError, match=r"23 of the first 2230 .*max_bad_share 0\.01.*row 3: broken"):
        count.add(bad)


def test_a_few_bad_samples_at_the_beginning_do_not_stop_training() -> None:
    count = BadSampleCount(max_share=0.02)
    bad = Drawn({"web/qa": 3}, 0, ("dataset 'web', row 3: broken",))
    for _ in range(4):  # of 16, taken as of 200
        count.add(bad)
    with pytest.raises(ValueError, match="5 of the first 20 samples are bad"):
        count.add(bad)


def test_a_share_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.max_bad_share is 2"):
        BadSampleCount(2)


@pytest.mark.parametrize("name", ["batch_size", "length_window", "val_samples", "num_workers"])
def test_wrong_number_is_named(name: str, pictures: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.{name} is -1"):
        Pi05DataModule({"robot": LeRobotConfig(str(pictures))}, **{name: -1})


@pytest.mark.parametrize("image_tokens", [4, 256])
def test_padding_is_below_five_percent_on_a_mixture_of_cameras_and_text(
    pictures: Path, three_cameras: Path, tmp_path: Path, image_tokens: int
) -> None:
    """With the datamodule's own length window: one camera, three cameras, none, and captions."""
    sources: dict[str, SourceConfig] = {
        "one": LeRobotConfig(str(pictures)),
        "three": LeRobotConfig(str(three_cameras)),
        "none": LeRobotConfig(str(pictures), cameras={}),
        "web": VisionTextConfig(captions(tmp_path, 60)),
    }
    data = Pi05DataModule(sources, batch_size=4, num_workers=0, shapes=ModelConfig.preset("debug").shapes)
    robots = {f"{name}/continuous_robot_actions": share for name, share in (("one", 5), ("three", 3), ("none", 1.7))}
    stage = StageOptions(LossWeights(text=1, flow=1), mixture={**robots, "web/web_caption": 1})
    data.recipe = Recipe.of(pretrain_steps=0, posttrain=stage)
    data.trainer = Trainer(max_steps=64, accelerator="cpu", logger=False, enable_progress_bar=False)
    data.trainer.strategy.connect(Pi05Module(ModelConfig.preset("debug")))
    drawn: Counter[str] = Counter()
    valid = positions = 0
    for batch in data.train_dataloader():
        drawn.update(batch.drawn.names)
        valid += int(batch.image_mask.sum()) * image_tokens + int(batch.token_mask.sum())
        positions += batch.image_mask.numel() * image_tokens + batch.tokens.numel()
    assert {name.partition("/")[0] for name in drawn} == set(sources)
    assert 1 - valid / positions < 0.05


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_samples_that_lightning_would_divide_among_ranks_again_are_refused(tmp_path: Path, stage: str) -> None:
    data = Pi05DataModule({"web": VisionTextConfig(captions(tmp_path, 4), val_fraction=0)}, num_workers=0)
    for ranks in (1, 2):
        data.trainer = Trainer(accelerator="cpu", devices=ranks, logger=False, enable_checkpointing=False)
        with pytest.raises(ValueError, match="use_distributed_sampler=False") if ranks > 1 else nullcontext():
            data.setup(stage)
