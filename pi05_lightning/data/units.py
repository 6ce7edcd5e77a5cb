"""Whether values are in the units, of the sign and in the range that others are in, by their quantiles."""

from __future__ import annotations

import numpy as np

from pi05_lightning.data.transforms import Quantiles

FAR = 1.0  # ranges (q99 - q01) beyond the training data from which on values are others
NARROW = 1 / 20  # of the training data's range: less is other units, or a dim that rests
ENDS = 0.1  # of an interval's width: how near values must come to both its ends to be taken for it
NOT_FINITE = "not finite"
UNITS = {
    180 / np.pi: ("degrees", "radians"),
    1000.0: ("millimetres", "metres"),
    100.0: ("centimetres or per cent", "metres or shares"),
    255.0: ("0..255", "0..1"),
}
"""Factor between two units: the smaller one and the larger one."""
INTERVALS = ((0.0, 1.0), (-1.0, 1.0), (0.0, 100.0), (-100.0, 100.0), (0.0, 255.0))
"""What grippers and normalised commands are given in."""


def unit_problems(ours: Quantiles, theirs: Quantiles, resting: bool = False) -> dict[str, list[int]]:
    """In words, what makes dims other than they were: the dims. resting: the ranges of `theirs` tell nothing."""
    far = np.maximum(ours.distance(theirs.q01), ours.distance(theirs.q99))
    with np.errstate(divide="ignore", invalid="ignore"):
        ranges = np.asarray(ours.q99 - ours.q01, float), np.asarray(theirs.q99 - theirs.q01, float)
        ratio = ranges[1] / ranges[0]
    narrow = (ratio < NARROW) & (ranges[1] > 0) & (not resting)
    found: dict[str, list[int]] = {}
    for dim in range(len(ours)):
        before, now = ((float(q.q01[dim]), float(q.q99[dim])) for q in (ours, theirs))
        if not np.isfinite(now).all():
            found.setdefault(NOT_FINITE, []).append(dim)
            continue
        problem = None if resting else other_interval(before, now) or _opposite(before, now)
        # one dim may rest where the others move
        if problem is None and (far[dim] > FAR or (narrow[dim] and narrow.mean() >= 0.5)):
            problem = _other_unit(ratio[dim]) or (f"{far[dim]:.3g} ranges beyond" if far[dim] > FAR else None)
        if problem is not None:
            found.setdefault(problem, []).append(dim)
    return found


def other_interval(before: tuple[float, float], now: tuple[float, float]) -> str | None:
    first, second = _interval(before), _interval(now)
    if first is None or second is None or first == second:
        return None
    return f"in {second[0]:g}..{second[1]:g} where {first[0]:g}..{first[1]:g} is expected"


def _interval(values: tuple[float, float]) -> tuple[float, float] | None:
    for low, high in INTERVALS:
        margin = ENDS * (high - low)
        if abs(values[0] - low) <= margin and abs(values[1] - high) <= margin:
            return low, high
    return None


def _opposite(before: tuple[float, float], now: tuple[float, float]) -> str | None:
    span = before[1] - before[0]
    direct = abs(now[0] - before[0]) + abs(now[1] - before[1])
    turned = abs(now[0] + before[1]) + abs(now[1] + before[0])
    return "of the opposite sign" if span > 0 and turned < 0.2 * span and direct > 0.5 * span else None


def _other_unit(ratio: float) -> str | None:
    """In words, what a quotient of two ranges means that is near that of two units."""
    for factor, (small, large) in UNITS.items():
        if factor / 1.5 < ratio < factor * 1.5:
            return f"like {small} where {large} are expected"
        if factor / 1.5 < 1 / ratio < factor * 1.5:
            return f"like {large} where {small} are expected"
    return None
