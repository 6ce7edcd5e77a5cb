"""Several `pi05` commands one after the other, each a process of its own, which go on where they were interrupted."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from rich.console import Console

from pi05_lightning.files.local import read_json, write_json

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM asks a job by one of the last two to save before its time is over."""
PLACES = "--device", "--num_workers", "--lanes", "--overwrite"
"""Options that say where a command is done, how much at a time, or what it may replace, and not what is done."""

console = Console()


@dataclass(frozen=True)
class Part:
    """One `pi05` command of several that belong together."""

    name: str
    command: tuple[str, ...]
    resume: tuple[str, ...] | None = None
    """What continues it after an interruption, once `resume_from` exists; the command itself otherwise."""
    resume_from: Path = Path()
    before: Callable[[], None] | None = None
    """What is written down first, of what earlier parts made."""

    @property
    def next_command(self) -> tuple[str, ...]:
        return self.resume if self.resume and self.resume_from.exists() else self.command


def run_parts(out: Path, todo: Sequence[Part], after: Callable[[], None]) -> None:
    """Run what is not done yet, and call `after` after each part, and at the end.

    Raises ValueError when `out` holds parts with other arguments, SystemExit with a part's status when one fails.
    """
    for number, part in enumerate(todo, start=1):
        done = Progress(out / "parts" / f"{part.name}.json", part)
        if done.finished:
            console.print(f"[dim]{number}/{len(todo)} {part.name}: done before, in {done.seconds:.0f} s")
            continue
        console.rule(f"{number}/{len(todo)} {part.name}", align="left")
        shown = f"$ {shlex.join(('pi05', *part.next_command))}"
        console.print(shown, style="bold", soft_wrap=True, highlight=False, markup=False)
        if part.before is not None:
            part.before()
        with done.timed():
            run_command(part.next_command)
        after()
    after()  # an earlier call may have ended between a part and what comes after it


class Progress:
    """What a part's marker file says: which command it was, the seconds it took so far, and whether it is done.

    One that failed, and left nothing to go on from, may be another command now.
    """

    def __init__(self, file: Path, part: Part) -> None:
        self.file = file
        self.command = list(part.command)
        marker = read_json(file, default={})
        goes_on = marker.get("done") or part.next_command == part.resume
        if goes_on and marker and _what(marker["command"]) != _what(self.command):
            raise ValueError(
                f"{file} is from `pi05 {shlex.join(marker['command'])}`, not from `pi05 {shlex.join(self.command)}`:"
                " give another --out, or delete the directory of the earlier one; where no later part is done, it is"
                " enough to delete this file, and what the earlier command made"
            )
        self.finished: bool = marker.get("done", False)
        self.seconds: float = marker.get("seconds", 0.0)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time spent inside, also when it ends early, and marks the part done when it does not."""
        start = monotonic()
        try:
            yield
            self.finished = True
        finally:
            self.seconds += monotonic() - start
            marker = {"command": self.command, "seconds": round(self.seconds, 1), "done": self.finished}
            write_json(self.file, marker)


def _what(command: Sequence[str]) -> list[str]:
    """A command without the options that say where it is done."""
    left_out = {place + step for place, word in enumerate(command) if word in PLACES for step in (0, 1)}
    return [word for place, word in enumerate(command) if place not in left_out]


def run_command(command: tuple[str, ...]) -> None:
    """Run a `pi05` command in a process of its own; raises SystemExit with its status when that is not 0.

    A signal reaches it once and we wait for it, so that training can save before everything ends. What came when it
    had nothing left to do ends the command too.
    """
    process: subprocess.Popen[bytes] | None = None
    came: list[int] = []

    def forward(number: int, _: object) -> None:
        came.append(number)
        if process is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)

    # `nohup` has SIGHUP ignored, by the part too
    heard = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
    try:
        process = subprocess.Popen([sys.executable, "-m", "pi05_lightning", *command], process_group=0)
        for number in came[:]:
            os.killpg(process.pid, number)
        status = process.wait()
        if not status and came:
            status = -came[-1]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status:
        status = status if status > 0 else 128 - status
        console.print(f"pi05 {command[0]} ended with status {status}; the same command again goes on from here.")
        raise SystemExit(status)
