"""How an episode or a scene begins: with everything in its place, or as others have left it."""

from __future__ import annotations

import zlib

import numpy as np

from pi05_lightning.sim.environment import Continued, Demonstrator
from pi05_lightning.sim.splits import BEGINNING


def begin(env: Demonstrator, seed: int, continued_share: float) -> None:
    """Reset to an initial state that the seed decides; raises ValueError where tasks share no scene and should."""
    if continued_share and not isinstance(env, Continued):
        raise ValueError(f"continued_share: {env.task} does not share its scene with other tasks: leave it 0")
    rng = np.random.default_rng([seed, zlib.crc32(env.task.encode()), BEGINNING])
    if isinstance(env, Continued) and rng.random() < continued_share:
        env.reset_after_others(seed)
    else:
        env.reset(seed)
