"""Names that a user gave, and what may have been meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SEARCHED = 10_000  # characters of known names: 40 ms, which a control loop can lose over a new sentence


def suggestion(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the known name that is nearest to a name or to its last part, or nothing.

    Whether letters are small or large makes no difference.  Nothing where so many are known, as a large dataset's tasks
    are, that looking takes too long.
    """
    known = list(known)
    if sum(map(len, known)) > _SEARCHED:
        return ""
    names, written = {own.lower(): own for own in reversed(known)}, name.replace("-", "_").lower()
    for part in (written, re.split(r"[./]", written)[-1]):
        if nearest := difflib.get_close_matches(part, names, n=1):
            return f" (did you mean {names[nearest[0]]}?)"
    return ""
