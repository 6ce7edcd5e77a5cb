"""`pi05 fit` with two loader processes on damaged data: it ends with the address, or goes on and lists it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.robot_run import write_config

from .test_bad_data import TOP, replace_image, short_video, video_file
from .test_lerobot_source import LENGTHS, truncate

PATIENCE = 300  # seconds, on a busy machine; none of these hangs
ENOUGH_TO_SEE = ("--stages.posttrain_steps", "10", "--data.batch_size", "4")  # to meet bad ones
Fit = Callable[..., tuple[int, str, Path]]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """`pi05 fit` on a dataset, in a process: exit code, what it printed, the run's directory."""

    def train(dataset: Path, on_bad_sample: str, max_bad_share: float = 1.0) -> tuple[int, str, Path]:
        config, run = write_config(tmp_path, dataset, on_bad_sample=on_bad_sample), tmp_path / "run"
        command = [sys.executable, "-m", "pi05_lightning", "fit", "-c", str(config), "--run", str(run)]
        command += ["--data.num_workers", "2", "--data.max_bad_share", str(max_bad_share), *ENOUGH_TO_SEE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return done.returncode, done.stderr, run

    return train


def complaint(printed: str) -> str:
    """The command's error; the video library of a loader's process may still print something after it."""
    return next(line for line in reversed(printed.splitlines()) if line.startswith("pi05 fit: "))


@pytest.mark.slow
def test_truncated_video_ends_training_with_its_address(videos_copy: Path, fit: Fit) -> None:
    truncate(video_file(videos_copy))
    code, printed, _ = fit(videos_copy, "error")
    assert code == 1
    assert complaint(printed).startswith("pi05 fit: stage posttrain, robot/continuous_robot_actions: ")
    for part in ("dataset 'robot', episode ", "frame", "top", "file-000.mp4", "Restore it", "on_bad_sample: skip"):
        assert part in complaint(printed)


@pytest.mark.slow
def test_skipped_samples_are_listed_in_the_run(pictures_copy: Path, fit: Fit) -> None:
    replace_image(pictures_copy, 5, b"no image")
    replace_image(pictures_copy, 13, b"no image")
    code, printed, run = fit(pictures_copy, "skip")
    assert code == 0, printed
    listed = [json.loads(line)["problem"] for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    addresses = {"dataset 'robot', episode 0, frame 5, top", "dataset 'robot', episode 1, frame 1, top"}
    assert {problem.partition(":")[0] for problem in listed} <= addresses
    assert listed
    assert all(problem in printed for problem in listed)


@pytest.mark.slow
def test_training_ends_when_too_many_samples_are_bad(pictures_copy: Path, fit: Fit) -> None:
    for row in range(0, 54, 2):
        replace_image(pictures_copy, row, b"no image")
    code, printed, _ = fit(pictures_copy, "skip", max_bad_share=0.05)
    assert code == 1
    assert "samples are bad, more than data.max_bad_share 0.05 allows" in complaint(printed)


@pytest.mark.slow
def test_training_does_not_start_when_too_many_frames_are_bad(videos_copy: Path, fit: Fit) -> None:
    short_video(videos_copy, 1)
    code, printed, _ = fit(videos_copy, "skip", max_bad_share=0.1)
    assert code == 1
    told = f"data.sources.robot: {LENGTHS[1]} of {sum(LENGTHS)} frames are bad (warned of above), more than"
    assert f"{told} data.max_bad_share 0.1 allows" in complaint(printed)


@pytest.mark.slow
def test_training_does_not_start_when_no_frame_is_usable(videos_copy: Path, fit: Fit) -> None:
    video_file(videos_copy).rename(videos_copy / "elsewhere.mp4")
    code, printed, _ = fit(videos_copy, "skip")
    assert code == 1
    assert TOP in printed
    assert "no usable frame is left" in complaint(printed)
