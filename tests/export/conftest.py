"""Untrained policies of every size, of a robot with two cameras, four state and two action dimensions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_lightning.data.processor import Language
from pi05_lightning.models.config import ModelConfig
from tests.random_fast import random_fast
from tests.untrained import untrained_policy

STATE = ["observation.state", "observation.gripper"]
TASK = "open the drawer"
QUESTION = "what is at <loc0100><loc0200>?"
FRESH = """
import signal, sys
for name in {absent}: sys.modules[name] = None  # to import it is an error
sys.path.insert(0, {folder!r})
import numpy as np
from runner import Policy
given = np.load({inputs!r})
policy = Policy()
seen = {{"top": given["top"], "wrist": given["wrist"]}}, given["state"], {task!r}
found = {{
    "flow": policy.act(*seen, noise=given["noise"]),
    "going_on": policy.act(*seen, noise=given["noise"], prefix_actions=given["past"]),
    "fast": policy.act(*seen, actions="fast"),
    "subtask": policy.subtask,
    "answer": policy.answer("top", given["top"], {question!r}),
}}
np.savez({outputs!r}, **found)
del policy
signal.signal(signal.SIGINT, lambda *_: None)
signal.raise_signal(signal.SIGINT)  # ends a process that is left without its stack for signals
"""


@pytest.fixture(scope="session")
def untrained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an untrained policy of a size, which says subtasks, and acts with both heads."""

    def made(size: str, **language: Any) -> Path:
        fast, folder = tmp_path_factory.mktemp("fast"), tmp_path_factory.mktemp(size)
        random_fast(ModelConfig.preset(size), vocab_size=300, scale=3).save(fast)
        data = {"fast": fast, "language": Language(condition_on="both", **language)}
        return untrained_policy(folder, videos, size, speaks=False, data=data, state_keys=STATE)

    return made


@pytest.fixture
def in_a_fresh_process(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What an exported folder answers in a process that has neither this package nor those named."""

    def answers(folder: Path, inputs: dict[str, np.ndarray], absent: tuple[str, ...] = ()) -> dict[str, Any]:
        files = [str(tmp_path / name) for name in ("inputs.npz", "outputs.npz")]
        np.savez(files[0], **inputs)
        names = ("pi05_lightning", "lightning", "lerobot", *absent)
        words = {"task": TASK, "question": QUESTION}
        script = FRESH.format(absent=names, folder=str(folder), inputs=files[0], outputs=files[1], **words)
        done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with np.load(files[1]) as found:
            return dict(found)

    return answers
