"""Features of a frozen vision tower on disk: the same training without running the tower again."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.lora import Lora
from pi05_lightning.models.siglip import Siglip
from pi05_lightning.recipe import LossWeights, Stage
from pi05_lightning.vision_cache import FeatureStore

from .conftest import POSTTRAIN_STEPS, PRETRAIN_STEPS

Train = Callable[..., Trainer]
TOWER = (r"backbone\.vision\.(?!projector)",)
MIXTURE = {"robot/continuous_robot_actions": 0.5, "robot/hl_subtask": 0.5}
FROZEN = Stage(LossWeights(subtask=1, flow=1), MIXTURE, freeze=TOWER)
LEARNING = Stage(LossWeights(subtask=1, flow=1), MIXTURE)
PLAIN: dict[str, Any] = {"data_options": {"augmentation": None}}


class Steps(Callback):
    """The loss of every step, and how many images the tower saw in it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.images: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def count(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            self._seen += len(args[0])

        pl_module.backbone.vision.patch_embedding.register_forward_pre_hook(count)

    def on_train_batch_start(self, *args: object) -> None:
        self._seen = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object) -> None:
        self.losses.append(outputs["loss"].item())
        self.images.append(self._seen)


def run(train: Train, pretrain: Stage, posttrain: Stage, cache: Path | None, **options: Any) -> Steps:
    steps = Steps()
    module_options = {"vision_cache": cache and str(cache)}
    train(
        steps, stages={"pretrain": pretrain, "posttrain": posttrain}, module_options=module_options, **PLAIN, **options
    )
    return steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_second_run_computes_no_image_and_learns_the_same(train: Train, tmp_path: Path, precision: str) -> None:
    plain = run(train, FROZEN, FROZEN, None, precision=precision)
    first = run(train, FROZEN, FROZEN, tmp_path / "cache", precision=precision)
    again = run(train, FROZEN, FROZEN, tmp_path / "cache", precision=precision)
    assert all(plain.images)
    assert any(first.images)
    assert not any(again.images)
    tolerance = {"rel": 1e-5} if precision == "32-true" else {"rel": 2e-2}
    assert first.losses == pytest.approx(plain.losses, **tolerance)
    assert again.losses == pytest.approx(plain.losses, **tolerance)


def test_only_the_stage_that_freezes_the_tower_uses_the_cache(train: Train, tmp_path: Path) -> None:
    plain = run(train, LEARNING, FROZEN, None)
    for _ in range(2):
        cached = run(train, LEARNING, FROZEN, tmp_path / "cache")
        assert cached.losses == pytest.approx(plain.losses, rel=1e-4)
    assert cached.images[:PRETRAIN_STEPS] == plain.images[:PRETRAIN_STEPS]
    assert not any(cached.images[PRETRAIN_STEPS:])
    assert len(cached.images) == PRETRAIN_STEPS + POSTTRAIN_STEPS


def test_features_of_other_weights_are_not_found(train: Train, tmp_path: Path) -> None:
    run(train, FROZEN, FROZEN, tmp_path / "cache")
    other = run(train, LEARNING, FROZEN, tmp_path / "cache")
    assert any(other.images[PRETRAIN_STEPS:])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_can_find_nothing_is_refused(train: Train, tmp_path: Path) -> None:
    options = {"vision_cache": str(tmp_path)}
    with pytest.raises(ValueError, match=r"set data\.augmentation to null"):
        train(module_options=options, stages={"pretrain": FROZEN, "posttrain": FROZEN})
    with pytest.raises(ValueError, match="needs a stage in which SigLIP is frozen"):
        train(module_options=options, stages={"pretrain": LEARNING, "posttrain": LEARNING}, **PLAIN)
    lora = {**options, "lora": Lora(rank=2)}
    with pytest.raises(ValueError, match="needs a stage in which SigLIP is frozen"):  # its adapters learn
        train(module_options=lora, stages={"pretrain": LEARNING, "posttrain": LEARNING}, **PLAIN)
    keypoints = {**options, "config": ModelConfig.preset("tiny")}
    with pytest.raises(ValueError, match="this model has a keypoint stem"):
        train(module_options=keypoints, stages={"pretrain": FROZEN, "posttrain": FROZEN}, **PLAIN)


# --- the store

KEYS = [bytes([i]) * 16 for i in range(5)]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def tensors(request: pytest.FixtureRequest) -> dict[bytes, torch.Tensor]:
    return {key: torch.randn(3, 8).to(request.param) for key in KEYS}


def opened(folder: Path, dtype: torch.dtype) -> FeatureStore:
    return FeatureStore(folder, (3, 8), dtype)


def test_every_process_finds_what_others_added(tmp_path: Path, tensors: dict[bytes, torch.Tensor]) -> None:
    dtype = tensors[KEYS[0]].dtype
    stores = [opened(tmp_path, dtype) for _ in range(2)]
    for store, keys in zip(stores, (KEYS[:2], KEYS[1:]), strict=True):
        for key in keys:
            store.add({key: tensors[key]})
            assert torch.equal(store[key], tensors[key])
    assert KEYS[4] not in stores[0]
    whole = opened(tmp_path, dtype)
    for key in KEYS:
        assert torch.equal(whole[key], tensors[key])


def test_what_was_cut_off_is_not_read(tmp_path: Path, tensors: dict[bytes, torch.Tensor]) -> None:
    dtype = tensors[KEYS[0]].dtype
    store = opened(tmp_path, dtype)
    store.add(tensors)
    (file,) = tmp_path.iterdir()
    with file.open("rb+") as f:
        f.truncate(file.stat().st_size - 1)
    assert [key in opened(tmp_path, dtype) for key in KEYS] == [True, True, True, True, False]
    with pytest.raises(OSError, match=r"was changed while it was in use: remove"):
        store[KEYS[4]]


@pytest.fixture
def little_room() -> Iterator[None]:
    """Files may have 256 bytes: two fp32 records of 112, and a part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_once_and_nothing_is_lost(tmp_path: Path, little_room: None) -> None:
    tensors = {key: torch.randn(3, 8) for key in KEYS}
    store = opened(tmp_path, torch.float32)
    store.add({key: tensors[key] for key in KEYS[:2]})
    with pytest.warns(UserWarning, match="vision_cache keeps no more features in"):
        store.add({KEYS[2]: tensors[KEYS[2]]})
    store.add({KEYS[3]: tensors[KEYS[3]]})
    for reader in (store, opened(tmp_path, torch.float32)):
        assert [key in reader for key in KEYS] == [True, True, False, False, False]
        assert torch.equal(reader[KEYS[1]], tensors[KEYS[1]])


def test_the_tower_and_its_projector_are_the_whole_stem() -> None:
    config = ModelConfig.preset("debug")
    vision = Siglip(config.vision, 32)
    images = torch.rand(2, 3, config.vision.image_size, config.vision.image_size)
    assert torch.equal(vision(images, torch.zeros(2))[0], vision.projector(vision.features(images)))
