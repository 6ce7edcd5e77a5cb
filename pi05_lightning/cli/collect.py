"""`pi05 collect`: demonstrations of a simulator's scripted experts, or a policy's attempts, as a LeRobot dataset."""

from pi05_lightning.sim.demonstrations.collect import collect

__all__ = ["collect"]
