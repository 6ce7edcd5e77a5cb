"""pi05_lightning's π0.5 as a policy of LeRobot. LeRobot imports this package, which makes its type known."""

from lerobot_policy_pi05_lightning.configuration_pi05_lightning import Pi05LightningConfig

__all__ = ["Pi05LightningConfig"]
