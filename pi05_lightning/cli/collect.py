"""`pi05 collect`: demonstrations of a simulator's scripted experts as a LeRobot dataset."""

from pi05_lightning.sim.demonstrations.collect import collect

__all__ = ["collect"]
