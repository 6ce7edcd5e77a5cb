"""How things are measured: pairs that alternate after a warm-up, medians, and the ratio of each pair for the spread."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pi05_lightning.evaluation.report.tables import markdown_table

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
"""Outputs of both sides may differ by this much, relative to the largest; more is an error, and nothing is timed."""
INT8_TOLERANCE = 0.1
"""The same for random weights, all layers in 8 bits."""


def meets(goal: str, value: float) -> bool:
    """Whether a value is what a goal such as `>= 3` or `<= 0.5` wants; where there is none, it is."""
    if not goal:
        return True
    sign, bound = goal.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


@dataclass(frozen=True)
class Row:
    """One line of the table. ratio is what the goal speaks of; low and high are its extremes over the pairs."""

    name: str
    goal: str
    """`>= 3` or `<= 0.5`; empty where no goal was set."""
    ratio: float
    low: float
    high: float
    peer: float
    ours: float
    unit: str
    day: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    """When it was measured."""
    machine: str = field(default_factory=lambda: processor())
    """The processor that it was measured on."""

    @property
    def met(self) -> bool:
        return meets(self.goal, self.ratio)


@dataclass(frozen=True)
class Options:
    """What every part takes on its command line."""

    quick: bool = False
    """Debug sizes and one pair: does it run? Its figures say nothing."""
    pairs: int = 5


def run_part(part: Callable[[Options], list[Row]]) -> None:
    """The command line of one part: `python -m benchmarks.PART [--quick] [--pairs N] [--json FILE]`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {sys.modules['__main__'].__spec__.name}", description=part.__doc__
    )
    parser.add_argument("--quick", action="store_true", help="debug sizes and one pair: only to see that it runs")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs per row (default 5)")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    print(environment(), flush=True)
    rows = part(Options(args.quick, 1 if args.quick else args.pairs))
    print(markdown(rows))
    if args.json:
        write_json(rows, args.json)


# --- timing


def alternate(peer: Callable[[], Any], ours: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, one warm-up pair and then `pairs` pairs; which side begins alternates too."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(-1, pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            (peer, ours)[side]()
            if pair >= 0:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def speed_up(name: str, goal: str, seconds: tuple[list[float], list[float]]) -> Row:
    """How many times faster ours is."""
    peer, ours = seconds
    return _row(name, goal, "s", peer, ours, [p / o for p, o in zip(peer, ours, strict=True)])


def share(name: str, goal: str, unit: str, reference: Sequence[float], ours: Sequence[float]) -> Row:
    """Ours as a share of the reference: cost over cost, or rate over the rate of a plain matrix product."""
    return _row(name, goal, unit, reference, ours, [o / r for r, o in zip(reference, ours, strict=True)])


def _row(name: str, goal: str, unit: str, peer: Sequence[float], ours: Sequence[float], ratios: list[float]) -> Row:
    row = Row(
        name=name,
        goal=goal,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        peer=statistics.median(peer),
        ours=statistics.median(ours),
        unit=unit,
    )
    spread = f"{row.low:.3g} to {row.high:.3g} over {len(ratios)}"
    print(f"  {name}: {row.ratio:.3g} ({spread}); {row.peer:.4g} -> {row.ours:.4g} {unit}", flush=True)
    return row


def check_equal(name: str, ours: torch.Tensor, peer: torch.Tensor, tolerance: float) -> None:
    """Print the largest difference, relative to the largest value; AssertionError above the tolerance."""
    error = ((ours.float() - peer.float()).abs().max() / peer.float().abs().max()).item()
    print(f"  {name}: largest difference {error:.1e} of the largest value (at most {tolerance:g})", flush=True)
    if not error <= tolerance:
        raise AssertionError(f"{name}: ours differs from the peer's by {error:.1e}, more than {tolerance:g}")


def flops_of(work: Callable[[], object]) -> int:
    """What a call computes, as PyTorch counts it; on meta tensors nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in a dtype with fp32 weights; nothing in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


# --- reporting


def processor() -> str:
    """What this machine's processor is called."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model n"))
    return next(names, platform.processor() or platform.machine())


def environment() -> str:
    """Versions, threads and the machine, in a few lines."""
    names = ("torch", "transformers", "lerobot", "lightning", "numpy", "duckdb", "tokenizers")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    installed = [f"{name} {version(name)}" for name in names if importlib.util.find_spec(name)]
    load = os.getloadavg()[0]
    return "\n".join(
        [
            f"{processor()}, {os.cpu_count()} cores,"
            f" {torch.get_num_threads()} threads, {memory:.0f} GiB, load {load:.1f}",
            f"Python {platform.python_version()}, " + ", ".join(installed),
            f"CPU capability {torch.backends.cpu.get_cpu_capability()}, {time.strftime('%Y-%m-%d %H:%M')}",
        ]
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; where a row compares ours with ours, or with a plain product, its name says so."""
    shown = list[tuple[str, ...]]()
    for row in rows:
        peer, ours = (_with_unit(value, row.unit) for value in (row.peer, row.ours))
        spread = f"{row.low:.3g}–{row.high:.3g}" if row.low < row.high else "–"
        goal = verdict(row.goal, row.ratio)
        shown.append((row.name, peer, ours, f"**{row.ratio:.3g}**", spread, goal))
    return markdown_table(("work", "LeRobot", "ours", "ratio", "spread", "goal"), shown)


def verdict(goal: str, value: float) -> str:
    """A goal as a table has it, and whether a value meets it."""
    if not goal:
        return "–"
    return f"{goal.replace('>=', '≥').replace('<=', '≤')}, {'met' if meets(goal, value) else '**missed**'}"


def _with_unit(value: float, unit: str) -> str:
    return f"{value / 1e9:.0f} G{unit}" if value > 1e9 else f"{value:.3g} {unit}"


def publish(rows: Sequence[Row], page: Path, header: str = "") -> None:
    """Put the table between a page's marks <!-- SPEED --> and <!-- /SPEED -->."""
    content = f"{header}\n\n{markdown(rows)}".strip()
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- SPEED -->")
    _, end, after = rest.partition("<!-- /SPEED -->")
    if not mark or not end:
        raise ValueError(f"{page} has no marks <!-- SPEED --> and <!-- /SPEED --> for the table")
    page.write_text(f"{before}{mark}\n\n{content}\n\n{end}{after}", encoding="utf-8")


def write_json(content: Any, path: Path) -> None:
    """Rows or figures, as objects of their fields, or what holds them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, default=asdict)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: Path) -> list[Row]:
    """Rows that `write_json` wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
