"""The LightningModule, which trains, measures and asks the model, and what it is put together from."""

from pi05_lightning.module.pi05_module import Pi05Module, default_optimizer
from pi05_lightning.module.prediction import Predicted

__all__ = ["Pi05Module", "Predicted", "default_optimizer"]
