"""What a training run does besides training: precision, sharding, checkpoint files, callbacks."""

from pi05_lightning.training.sharding import FSDP2  # here, so that Lightning knows it by its name in every run

__all__ = ["FSDP2"]
