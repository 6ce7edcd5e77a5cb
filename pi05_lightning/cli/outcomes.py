"""`pi05 outcomes`: says of a dataset's episodes how they ended, where the recording does not."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pi05_lightning.data.attempts import outcomes as known_outcomes
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.outcomes import OUTCOMES, Outcome, read_outcomes
from pi05_lightning.evaluation.report.tables import table_of
from pi05_lightning.files.local import write_json

NAMES = {True: "success", False: "failure", None: "unknown"}

console = Console()


def outcomes(dataset: Path, success: str = "", failure: str = "") -> dict[str, list[int]]:
    """Say which episodes of a LeRobot dataset succeeded, and show what is known of each.

    What is said lies in meta/pi05_outcomes.json, and counts for more than what was recorded. Nothing else of the
    dataset changes. It may be said bit by bit: what was said of other episodes stays.

    Args:
        dataset: its folder.
        success: numbers of episodes that succeeded, as "0-9, 12"; "rest" are all of which nothing is known otherwise.
        failure: the same of those that failed.

    Returns {"success" | "failure" | "unknown": episodes}.
    Raises ValueError for episodes that there are not, and for one of which both is said.
    """
    files = LeRobotFiles.open(dataset)
    if success or failure:
        say(files, {True: success, False: failure})
        files = LeRobotFiles.open(dataset)
    known = known_outcomes(files)
    console.print(table(files, known))
    return {name: [number for number, ended in known.items() if ended is value] for value, name in NAMES.items()}


def say(files: LeRobotFiles, told: dict[bool, str]) -> None:
    """Write how episodes ended; `told` as a user lists them. Raises ValueError as `outcomes` does."""
    frames = dict(zip(files.column("episode_index").tolist(), files.column("length").tolist(), strict=True))
    listed = {ended: numbers_of(text) for ended, text in told.items()}
    if missing := sorted({number for numbers in listed.values() for number in numbers or ()} - set(frames)):
        raise ValueError(f"{files.root} has no episode {missing[0]}: it has {len(frames)}, from {min(frames)} on")
    if both := sorted(set(listed[True] or ()) & set(listed[False] or ())):
        raise ValueError(f"episode {both[0]} is named as a success and as a failure: leave out one")
    if listed[True] is listed[False] is None:
        raise ValueError("the rest are named as successes and as failures: leave out one")
    said, before = read_outcomes(files.root), known_outcomes(files)
    unknown = {number for number, ended in before.items() if ended is None}
    rest = unknown - {number for numbers in listed.values() for number in numbers or ()}
    for ended, numbers in listed.items():
        of_these = rest if numbers is None else numbers
        said |= {number: Outcome(success=ended, frames=frames[number]) for number in of_these}
        for number in sorted(of_these):
            if before[number] is (not ended):
                console.print(f"episode {number}: was {NAMES[not ended]}, is {NAMES[ended]}", highlight=False)
    write_json(files.root / OUTCOMES, {str(number): said[number] for number in sorted(said)})


def numbers_of(text: str) -> list[int] | None:
    """Episodes as people write them, "0-9, 12"; None for "rest".

    Raises ValueError for anything else.
    """
    if text.strip() == "rest":
        return None
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)\s*(?:-\s*(\d+))?", part)
        if not match or not (numbers := range(int(match[1]), int(match[2] or match[1]) + 1)):
            raise ValueError(f"{part!r} is no episode: write numbers and ranges, as 0-9, 12, or rest")
        found += numbers
    return found


def table(files: LeRobotFiles, known: dict[int, bool | None]) -> Table:
    said, found = read_outcomes(files.root), table_of(str(files.root), ["episode"], ["seconds", "ended", "said by"])
    for (number, ended), frames in zip(known.items(), files.column("length").tolist(), strict=True):
        source = "you" if number in said else "–" if ended is None else "the recording"
        found.add_row(str(number), f"{frames / files.fps:.1f}", NAMES[ended], source)
    return found
