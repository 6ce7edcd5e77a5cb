"""Numbers that a user gives, and where they must lie."""

from __future__ import annotations

import math


def check_range(name: str, value: float, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """ValueError, by name, unless a number is finite and within `least` (or above it) and `most`; NaN never is."""
    if (value > least if above else value >= least) and value <= most and value < math.inf:
        return
    lower = f"above {least:g}" if above else f"at least {least:g}"
    raise ValueError(f"{name} is {value}: it must be {lower}{'' if most == math.inf else f' and at most {most:g}'}")
