"""How an episode or a scene begins: with everything in its place, or as others have left it."""

from __future__ import annotations

from pi05_lightning.sim.environment import Continued, Demonstrator
from pi05_lightning.sim.splits import BEGINNING, rng_of


def begin(env: Demonstrator, seed: int, continued_share: float) -> None:
    """Reset to an initial state that the seed decides; raises ValueError where tasks share no scene and should."""
    if continued_share and not isinstance(env, Continued):
        raise ValueError(f"continued_share: {env.task} does not share its scene with other tasks: leave it 0")
    rng = rng_of(env.task, seed, BEGINNING)
    if isinstance(env, Continued) and rng.random() < continued_share:
        env.reset_after_others(seed)
    else:
        env.reset(seed)
