"""Runs an experiment with several training seeds, and gathers what they came to beside the recipe that it differs from.

An experiment is a folder under experiments/: a config.yaml, which says how it differs from its recipe, or a run.py with
the commands data, train and rollout. Its recipe is the one of its number in tools/experiment_recipes.py, as
012_desk_ablations is of 012a_without_stage_1, and else 001. Data and FAST tokenizer are those of a demo. What is done
is not done again: an interrupted experiment goes on where it was, and one that is done is only gathered anew.
"""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from jsonargparse import auto_cli

from pi05_lightning.cli.parts import run_command
from pi05_lightning.data.labels import fingerprint
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.files.local import read_json, sha256, write_json
from tools.experiment_recipes import EXPERIMENTS, recipe_of
from tools.experiment_results import gather, seeds_in

BY_HAND = ("007_quantised_base", "008_mt50", "013_fast_vocabulary")


def experiment(
    name: str, seeds: tuple[int, ...] = (0, 1, 2), demo: Path | None = None, out: Path = Path("runs/experiments")
) -> None:
    """Train, validate and roll out with every seed; write results.json, plot.png and the README's tables.

    Args:
        name: of the folder under experiments/.
        seeds: of the training; the data and the initial states of the rollouts are the same for every seed.
        demo: directory of a demo, for its data and its tokenizer; by default runs/demo, or runs/desk at the desk.
        out: where the runs go, as NAME/seedN.

    Raises SystemExit for an unknown name, where there is no demo, where a seed was made with another configuration or
    of other data, and when a part fails.
    """
    names = sorted(folder.name for folder in EXPERIMENTS.iterdir() if folder.is_dir())
    if name not in names:
        raise SystemExit(f"there is no experiment {name!r}: it is one of {', '.join(names)}")
    if name in BY_HAND:
        raise SystemExit(f"{name} asks another question than success: run the commands in experiments/{name}/README.md")
    demo = demo or recipe_of(name).demo
    runs = {seed: out / name / f"seed{seed}" for seed in seeds}
    there = seeds_in(out / name) | runs
    parts = {seed: commands(name, seed, demo, run) for seed, run in there.items()}
    data = data_of(demo)

    def origin(command: tuple[str, ...]) -> dict[str, str]:
        return {"made_by": identity(name, command), "data": data}

    for seed, run in there.items():
        for part, command in parts[seed].items():
            check_made_by(marker_of(run, part), origin(command))
    for seed, run in runs.items():
        for part, command in parts[seed].items():
            goes_on = part == "fit" and (run / "checkpoints" / "last.ckpt").exists()
            now = ("fit", "--ckpt_path", str(run)) if goes_on else command
            run_part(marker_of(run, part), now, origin(command))
    gather(name, out)


def marker_of(run: Path, part: str) -> Path:
    """The file that says what a part of a run was made by, how long it took, and whether it is done."""
    return run / "parts" / f"{part}.json"


def identity(name: str, command: tuple[str, ...]) -> str:
    """SHA-256 of a part's command, and of what the experiment's configurations or its script say."""
    script = EXPERIMENTS / name / "run.py"
    files = [script] if script.is_file() else [EXPERIMENTS.parent / layer for layer in configs(name)]
    texts = (file.read_text(encoding="utf-8") for file in files)
    return hashlib.sha256("\0".join([*command, *texts]).encode()).hexdigest()


def data_of(demo: Path) -> str:
    """SHA-256 of a demo's demonstrations and of its FAST tokenizer."""
    tokenizer = (sha256(file) for file in sorted((demo / "fast").glob("*")))
    shown = fingerprint(LeRobotFiles.open(demo / "data" / "robot"))
    return hashlib.sha256("\0".join([shown, *tokenizer]).encode()).hexdigest()


def check_made_by(marker: Path, origin: Mapping[str, str]) -> None:
    """SystemExit where a part was made otherwise, or its training would go on so.

    origin: `identity`, and `data_of` the demo, which markers of before it was written do not have.
    """
    before = read_json(marker, default={})
    counts = before.get("done") or (marker.parents[1] / "checkpoints").exists()
    for key, what in {"made_by": "another command or configuration", "data": "other data or another tokenizer"}.items():
        if counts and before.get(key, origin[key]) != origin[key]:
            raise SystemExit(
                f"{marker} is of {what} than today's: delete {marker.parent.parent}, or give another --out"
            )


def configs(name: str) -> list[str]:
    """The configurations of an experiment, in order: what it differs from comes first."""
    recipe = recipe_of(name)
    layers = (f"experiments/{layer}/config.yaml" for layer in dict.fromkeys((recipe.name, name)))
    return [*recipe.base, *(layer for layer in layers if (EXPERIMENTS.parent / layer).is_file())]


def commands(name: str, seed: int, demo: Path, run: Path) -> dict[str, tuple[str, ...]]:
    """What a seed takes, part by part: arguments of `pi05`, or a script and its own."""
    data, recipe = demo / "data", recipe_of(name)
    if not (data / "robot").is_dir():
        raise SystemExit(
            f"{data} has no data: run `{recipe.command}` first, or give the directory of a demo with --demo"
        )
    script = EXPERIMENTS / name / "run.py"
    if script.is_file():
        words = (str(data / "robot"), str(run))
        return {
            "data": (str(script), "data", words[0]),
            "fit": (str(script), "train", *words, "--seed", str(seed)),
            "rollout": (str(script), "rollout", *words),
        }
    layers = [word for config in configs(name) for word in ("-c", config)]
    paths = ("--data.sources.robot.path", f"{data}/robot", "--data.sources.web.path", f"{data}/web")
    fit = ("fit", *layers, "--run", str(run), "--seed_everything", str(seed), *paths, "--data.fast", f"{demo}/fast")
    known = {"run": run, "data": data, "seed": seed}
    parts = {name: tuple(word.format_map(known) for word in words) for name, words in recipe.parts.items()}
    return {"fit": fit, "validate": ("validate", str(run)), **parts}


def run_part(marker: Path, command: tuple[str, ...], origin: Mapping[str, str]) -> None:
    """Run a command with one thread unless its marker says that it is done; the marker holds its CPU seconds."""
    before = read_json(marker, default={})
    if before.get("done"):
        print(f"{marker}: done before")
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other would count as work
    print("$", *command, flush=True)
    start, done = cpu_seconds(), False
    write_json(marker, {"cpu_seconds": before.get("cpu_seconds", 0.0), "done": False, **origin})
    try:
        if command[0].endswith(".py"):
            status = subprocess.run([sys.executable, *command]).returncode
            if status:
                raise SystemExit(status)
        else:
            run_command(command)
        done = True
    finally:
        seconds = before.get("cpu_seconds", 0.0) + cpu_seconds() - start
        write_json(marker, {"cpu_seconds": round(seconds, 1), "done": done, **origin})


def cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    auto_cli(experiment)
