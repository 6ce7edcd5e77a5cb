"""From observations to actions: how a policy acts, and what computes it."""

from pi05_lightning.acting.as_measured import measured, weights_of
from pi05_lightning.acting.options import ROLLOUT, Acting, check

__all__ = ["ROLLOUT", "Acting", "check", "measured", "weights_of"]
