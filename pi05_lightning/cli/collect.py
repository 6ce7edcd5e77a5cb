"""`pi05 collect`: demonstrations of MetaWorld's scripted experts as a LeRobot dataset."""

from pi05_lightning.sim.metaworld.collect import collect

__all__ = ["collect"]
