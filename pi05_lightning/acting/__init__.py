"""From observations to actions: how a policy acts, and what computes it."""

from pi05_lightning.acting.options import ROLLOUT, Acting, check, measured, weights_of

__all__ = ["ROLLOUT", "Acting", "check", "measured", "weights_of"]
