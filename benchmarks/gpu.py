"""π0.5 at full size on one CUDA device: does it run right there, and how fast? `python -m benchmarks.gpu`

Every part is a process of its own, and its figures are written as soon as it ends, under the device's name: the command
goes on where it was stopped, and --again measures anew. It stops by itself after ten minutes. Where there is no CUDA
device, it says so. With --quick, results/ is left alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_figures import Figure, Place
from benchmarks.gpu_parts import ROOT, ceilings, chunks, peer, tests
from benchmarks.gpu_training import Training, sharded, training
from benchmarks.harness import environment, verdict, write_json
from pi05_lightning.evaluation.report.tables import markdown_table

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
LIMIT = 300  # seconds of a part
MINUTES = 10.0  # of the command

PARTS: dict[str, Callable[[Place], list[Figure]]] = {
    "tests": tests,
    "ceilings": ceilings,
    "chunks": chunks,
    "train-mixed": training(Training(16, "bf16-mixed", checkpointing=True)),
    "train-checkpointed": training(Training(32, checkpointing=True)),
    "train-kept": training(Training(12)),
    "train-lora": training(Training(12, lora=True)),
    "train-nf4": training(Training(12, checkpointing=True, lora=True, base="nf4")),
    "train-int8": training(Training(12, checkpointing=True, lora=True, base="int8")),
    "train-8-bit": training(Training(32, checkpointing=True, eight_bits=True)),
    "train-sharded": sharded(Training(8, "bf16-mixed", checkpointing=True)),
    "train-pretrain": training(Training(32, checkpointing=True, pretrain=True)),
    "train-mixed-compiled": training(Training(40, "bf16-mixed", checkpointing=True, compile=True, goal=">= 0.45")),
    "train-checkpointed-compiled": training(Training(64, checkpointing=True, compile=True, goal=">= 0.45")),
    "train-kept-compiled": training(Training(24, compile=True, goal=">= 0.45")),
    "peer": peer,
}
NEEDS = {"tests": ("lerobot", "av", "duckdb"), "peer": ("lerobot",)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results already")
    parser.add_argument("--json", type=Path, help=f"where the results are (default: {RESULTS}, none with --quick)")
    parser.add_argument("--quick", action="store_true", help="debug sizes, on the CPU too: only to see that it runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="to stop after (default: %(default)g)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        write_json(PARTS[args.part](Place(args.quick)), args.json)
        return
    if not torch.cuda.is_available() and not args.quick:
        print("There is no CUDA device here: nothing to measure.")
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, args.json or (Path(folder) / RESULTS.name if args.quick else RESULTS))


def measure(args: argparse.Namespace, file: Path) -> None:
    """Run the parts that a file of results lacks of this device, add their figures to it, and print all of them."""
    devices = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results = {"parts": {}, "environments": {}} | devices.get(device, {})
    devices[device] = results
    now, new = environment(), set[str]()
    failed, left, end = [], [], time.monotonic() + 60 * args.minutes
    for part in args.only:
        missing = [name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None]
        if missing:
            print(f"--- {part}: left out, as {', '.join(missing)} is not installed", flush=True)
        elif part in results["parts"] and not args.again:
            print(f"--- {part}: measured before", flush=True)
        elif (seconds := end - time.monotonic()) <= 0:
            left.append(part)
        else:
            print(f"--- {part}", flush=True)
            figures = in_its_own_process(part, file, args.quick, min(LIMIT, seconds))
            if figures is None:
                (failed if time.monotonic() < end else left).append(part)
                continue
            results["parts"][part] = figures
            results["environments"][part] = now
            new.add(part)
            write_json(devices, file)
    print("\n" + "\n".join([device, now, *kept(results, new)]) + f"\n\n{table(results)}")
    if left:
        again = "--again " if args.again else ""
        print(f"\nAfter {args.minutes:g} minutes some parts are left: go on with {again}--only {' '.join(left)}")
    if failed:
        sys.exit(f"these parts failed: {', '.join(failed)}")


def in_its_own_process(part: str, beside: Path, quick: bool, limit: float) -> list[dict[str, Any]] | None:
    """Its figures, None where it failed, or took more than so many seconds."""
    output = beside.with_name(f".{part}.json")
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--json", str(output)]
    start = time.perf_counter()
    try:
        code = subprocess.run([*command, "--quick"] if quick else command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = f"no result within {limit:.0f} s"
    print(f"    {time.perf_counter() - start:.0f} s, {code or 'done'}", flush=True)
    figures = json.loads(output.read_text(encoding="utf-8")) if not code else None
    output.unlink(missing_ok=True)
    return figures


def kept(results: dict[str, Any], new: set[str]) -> list[str]:
    """Lines that say of the parts that are not new in which environments they were measured."""
    found: dict[str, list[str]] = {}
    for part in results["parts"].keys() - new:
        # before every part had its own, a device had that of the last one
        of_last = f"kept, the last of them from:\n{results.get('environment', 'not known')}"
        own = results["environments"].get(part)
        found.setdefault(f"kept from:\n{own}" if own else of_last, []).append(part)
    return [f"{said}\n{', '.join(sorted(parts))}" for said, parts in sorted(found.items())]


def table(results: dict[str, Any]) -> str:
    figures = [Figure(**values) for part in results["parts"].values() for values in part]
    rows = [(f.name, f"{f.value:.3g} {f.unit}", verdict(f.goal, f.value)) for f in figures]
    return markdown_table(("work", "measured", "goal"), rows)


if __name__ == "__main__":
    main()
