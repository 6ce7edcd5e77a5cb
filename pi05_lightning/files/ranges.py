"""What a user gives, and what it may be."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable


def check_range(name: str, value: float | None, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """ValueError, by name, unless a number is finite and within `least` (or above it) and `most`, or is None.

    NaN never is.
    """
    if value is None or ((value > least if above else value >= least) and value <= most and value < math.inf):
        return
    lower = f"above {least:g}" if above else f"at least {least:g}"
    raise ValueError(f"{name} is {value}: it must be {lower}{'' if most == math.inf else f' and at most {most:g}'}")


def check_unique(name: str, values: Iterable[str]) -> None:
    """ValueError, by name, for a value that is there twice."""
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{name}: {', '.join(twice)} is named twice")


def check_expressions(name: str, patterns: Iterable[str]) -> None:
    """ValueError, by name, for a text that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} in {name} is no regular expression: {error}") from error
