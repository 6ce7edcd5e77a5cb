"""`python -m benchmarks [--quick]`: every part in a process of its own, one after the other.

It writes results/, and the table into README.md and docs/profile-and-benchmark.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row, environment, markdown, processor, publish, read_json

PARTS = (
    "train",
    "chunk",
    "engines",
    "counts",
    "recipe",
    "base",
    "small_card",
    "data",
    "stats",
    "fast",
    "serve",
    "growth",
)
HEADLINES = (
    "train, fp32, 2 of 3 cameras, 60 tokens",
    "train, bf16, 2 of 3 cameras, 60 tokens",
    "train with activation checkpointing, fp32",
    "train the expert only, fp32",
    "peak activation memory of a training step with checkpointing, base",
    "one chunk, mid, fp32, 2 of 3 cameras, 60 tokens",
    "one chunk, base, bf16, 2 of 3 cameras, 60 tokens",
    "from file to first chunk, base, bf16",
    "peak resident memory, base, bf16 inference, loading included",
    "loader, 2 cameras of 256² as video, 2 workers, 400 samples",
    "statistics of 100 000 frames, 2 × 14 dims, 200 episodes",
    "FAST encode, 20000 noisy chunks of 50 × 14",
)
"""Of the README: what LeRobot does too, one row of each kind of work."""
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="debug sizes and one pair; results/ is left alone")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; others keep their rows")
    args = parser.parse_args()
    header, start, failed = environment(), time.time(), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) if args.quick else RESULTS
        for part in args.only:
            print(f"--- {part}", flush=True)
            found = Path(folder) / f"{part}.new.json"
            command = [sys.executable, "-m", f"benchmarks.{part}", "--json", str(found)]
            if subprocess.run([*command, "--quick"] if args.quick else command).returncode:
                failed.append(part)
            else:
                shutil.move(found, results / f"{part}.json")
        files = {part: results / f"{part}.json" for part in PARTS}
        measured = {part: read_json(file) for part, file in files.items() if file.is_file()}
    new = {*args.only} - {*failed}
    header = "\n".join([header, *kept({part: rows for part, rows in measured.items() if part not in new})])
    rows = [row for part_rows in measured.values() for row in part_rows]
    table = markdown(rows)
    print(f"\n{header}\n\n{table}\n\n{(time.time() - start) / 60:.0f} minutes")
    if not args.quick:
        publish(rows, ROOT / "docs" / "profile-and-benchmark.md", f"```\n{header}\n```")
        by_name = {row.name: row for row in rows}
        publish([by_name[name] for name in HEADLINES], ROOT / "README.md")
    if failed:
        sys.exit(f"these parts failed, and keep the rows that they had: {', '.join(failed)}")


def kept(measured: dict[str, list[Row]]) -> list[str]:
    """Lines that say of parts when they were measured, and on which processor, if not this one."""
    here, found = processor(), dict[str, list[str]]()
    for part, (row, *_) in measured.items():
        place = "" if row.machine == here else f", on {row.machine}"
        found.setdefault(f"kept from {row.day}{place}", []).append(part)
    return [f"{said}: {', '.join(parts)}" for said, parts in sorted(found.items())]


if __name__ == "__main__":
    main()
