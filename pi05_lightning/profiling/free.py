"""The memory that is free here: a device's, or the machine's as far as this process may have it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a CUDA device; for others, in the machine's memory (swap is not counted)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = int(_numbers(meminfo)["MemAvailable:"]) * 1024
    return max(0, min([available, *left_by_cgroups()]))


def left_by_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterable[int]:
    """What the limit of each group that the process is in leaves, both versions; files in its cache can go."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, used, cache = names
        # a container may see its own group as the root
        groups = [top / path.lstrip("/"), *(top / path.lstrip("/")).parents]
        for group in groups[: groups.index(top) + 1] if top in groups else ():
            if (group / limit).is_file() and (group / used).is_file():
                text = (group / limit).read_text().strip()
                if text != "max":
                    reclaimable = int(_numbers(group / "memory.stat").get(cache, 0))
                    yield int(text) - int((group / used).read_text()) + reclaimable


def _numbers(file: Path) -> dict[str, str]:
    """The second word of each line by its first."""
    return dict(line.split()[:2] for line in file.read_text().splitlines()) if file.is_file() else {}
