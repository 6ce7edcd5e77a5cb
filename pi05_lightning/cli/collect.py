"""`pi05 collect`: demonstrations of MetaWorld's scripted experts as a LeRobot v3 dataset, with language."""

from __future__ import annotations

from pathlib import Path

from pi05_lightning.sim.metaworld.collect import record_dataset
from pi05_lightning.sim.metaworld.config import CollectConfig


def collect(config: CollectConfig) -> Path:
    """Make the dataset and return its directory, see `record_dataset`."""
    return record_dataset(config)
