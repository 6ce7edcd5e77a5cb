"""`pi05 serve`, or another command that serves, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

PATIENCE = 120  # seconds


class Process:
    """A server that listens.  address: `host:port`;  said: the lines of its log so far."""

    def __init__(self, checkpoint: Path, *options: str, command: str = "serve", **environment: str) -> None:
        words = [sys.executable, "-m", "pi05_lightning", command, str(checkpoint), "--port", "0", *options]
        env = os.environ | environment
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
        self.said: list[str] = []
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_until_it_listens(self) -> None:
        assert self._listening.wait(PATIENCE), f"it does not listen: {self.log}"
        assert self.process.poll() is None, self.log
        self.address = self.line("serving at").split("://")[1].strip()

    @property
    def log(self) -> str:
        return "".join(self.said)

    def line(self, text: str) -> str:
        """The first with this text."""
        return next(line for line in self.said if text in line)

    def status(self, path: str) -> int:
        """Of an HTTP answer."""
        try:
            with urlopen(f"http://{self.address}/{path}", timeout=PATIENCE) as answer:
                return answer.status
        except OSError as error:
            return getattr(error, "code", 0)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "serving at" in line:
                self._listening.set()
        self._listening.set()


@contextmanager
def served_by_process(checkpoint: Path, *options: str, command: str = "serve", **environment: str) -> Iterator[Process]:
    """The process, which is killed in the end if it still runs."""
    server = Process(checkpoint, *options, command=command, **environment)
    try:
        server.wait_until_it_listens()
        yield server
    finally:
        server.process.kill()
        server.process.wait(PATIENCE)
