"""MetaWorld: its tasks as environments, and as demonstrations with language."""

from pi05_lightning.sim.metaworld.environment import MetaWorld

__all__ = ["MetaWorld"]
