"""The processor's cores."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Those that this process may use: a scheduler may give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
