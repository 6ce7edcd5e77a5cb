"""The simulators that `--env` and YAML know by their bare names; any other goes by its import path."""

from pi05_lightning.sim.desk.environment import Desk
from pi05_lightning.sim.lerobot_env import LeRobotEnv
from pi05_lightning.sim.libero import Libero
from pi05_lightning.sim.metaworld.environment import MetaWorld
from pi05_lightning.sim.metaworld.mt50 import MT50

__all__ = ["MT50", "Desk", "LeRobotEnv", "Libero", "MetaWorld"]
