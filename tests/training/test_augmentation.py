"""What becomes of images between the loader and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pi05_lightning.types import Batch


class Images(Callback):
    """The pixels that the model is given, by the phase that they are for."""

    def __init__(self) -> None:
        self.training: list[torch.Tensor] = []
        self.validation: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        self.training.append(batch.pixels)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Batch, index: int, loader: int = 0
    ) -> None:
        self.validation.append(batch.pixels)


@pytest.fixture
def seen(train: Callable[..., Trainer]) -> Callable[..., Images]:
    def seen(**data_options: Any) -> Images:
        images = Images()
        train(images, data_options=data_options, max_steps=2, limit_val_batches=1)
        return images

    return seen


def test_training_images_are_augmented_and_those_of_validation_are_not(seen: Callable[..., Images]) -> None:
    augmented, plain = seen(), seen(augmentation=None)
    for changed, image in zip(augmented.training, plain.training, strict=True):
        assert changed.shape == image.shape
        assert not torch.equal(changed, image)
    assert all(map(torch.equal, augmented.validation, plain.validation))
    assert len(augmented.validation) == len(plain.validation) > 0
