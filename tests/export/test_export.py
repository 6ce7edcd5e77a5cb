"""`pi05 export`: what is written acts as the policy does, in a process that has never heard of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_lightning import Pi05Policy, __version__
from pi05_lightning.cli.main import main
from pi05_lightning.export.comparison import Comparison
from pi05_lightning.export.runner import Policy
from pi05_lightning.weights.locate import locate

from .conftest import QUESTION, TASK

STATE_KEYS = "[observation.state, observation.gripper]"
Untrained = Callable[[str], Path]
Fresh = Callable[..., dict[str, Any]]


def arguments(checkpoint: Path, out: Path, videos: Path, *options: str) -> list[str]:
    data = ["--data", str(videos), "--state_keys", STATE_KEYS]
    return ["export", str(checkpoint), "--out", str(out), *data, "--frames", "2", *options]


def export(checkpoint: Path, out: Path, videos: Path, *options: str) -> str:
    """What `pi05 export` prints; a process of its own, as an engine that crashes there would end all other tests."""
    command = [sys.executable, "-m", "pi05_lightning", *arguments(checkpoint, out, videos, *options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def observation(action_dim: int) -> dict[str, np.ndarray]:
    """Images of no size that the model is made for, and the noise that its flow starts from."""
    rng = np.random.default_rng(1)
    return {
        "top": rng.integers(0, 256, (48, 64, 3), np.uint8),
        "wrist": rng.random((3, 37, 21), np.float32),
        "state": rng.normal(size=4).astype(np.float32),
        "noise": rng.standard_normal((8, action_dim), np.float32),
        "past": np.array([[1.0, 3.0], [2.0, 5.0]], np.float32),
    }


def expected(checkpoint: Path, seen: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the policy itself answers, and the range of its actions."""
    policy = Pi05Policy(checkpoint)
    images = {"top": seen["top"].transpose(2, 0, 1), "wrist": seen["wrist"]}
    asked = {"image": images, "state": seen["state"], "task": TASK}
    return {
        "flow": policy.predict_chunk(asked, seen["noise"]),
        "going_on": policy.predict_chunk(asked, seen["noise"], seen["past"]),
        "fast": Pi05Policy(checkpoint, actions="fast").predict_chunk(asked),
        "subtask": policy.predict_subtask(asked),
        "answer": policy.answer(policy.frame(asked), QUESTION, "top"),
        "range": policy.processor.robots["robot"].normalize.action.span,
    }


def assert_acts_as(answers: dict[str, Any], policy: dict[str, Any]) -> None:
    for name in ("flow", "going_on", "fast"):
        assert np.abs((answers[name] - policy[name]) / policy["range"]).max() < 1e-4, name
    assert str(answers["subtask"]) == policy["subtask"]
    assert str(answers["answer"]) == policy["answer"]


@pytest.mark.slow
def test_exported_policy_acts_as_the_policy_without_this_package_or_torch(
    untrained: Untrained, videos: Path, in_a_fresh_process: Fresh, tmp_path: Path
) -> None:
    checkpoint, out = untrained("debug"), tmp_path / "exported"
    said = export(checkpoint, out, videos)
    assert said.index("opening") < said.index("writing the graphs for openvino") < said.index("2 of 2 the same")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["compared"]["flow_error"] < 1e-4
    assert manifest["policy"] == {"sha256": locate(checkpoint).content_hash(), "pi05_lightning": __version__}
    seen = observation(action_dim=6)
    assert_acts_as(in_a_fresh_process(out, seen, absent=("torch",)), expected(checkpoint, seen))
    with pytest.raises(SystemExit, match=r"--out .* already exists"):
        main(arguments(checkpoint, out, videos))
    policy, images = Policy(out), {"top": seen["top"], "wrist": seen["wrist"]}
    with pytest.raises(ValueError, match="wrist missing"):
        policy.act({"top": seen["top"]}, seen["state"], TASK)
    with pytest.raises(ValueError, match=r"state\[2\] is 900.0: .* quantile ranges outside"):
        policy.act(images, np.array([0, 0, 900, 0]), TASK)
    with (out / "embedding.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"damaged")
    with pytest.raises(ValueError, match=r"embedding\.npy is not the file that was exported"):
        Policy(out)


def test_nothing_is_written_where_the_exported_policy_acts_otherwise() -> None:
    alike = Comparison(frames=4, flow_error=1e-6, fast_error=None, same_subtasks=4, seconds=1, seconds_pytorch=1)
    assert alike.problems(1e-3) == []
    other = Comparison(frames=4, flow_error=float("nan"), fast_error=0.5, same_subtasks=3, seconds=1, seconds_pytorch=1)
    assert len(other.problems(1e-3)) == 3


def test_export_without_frames_to_compare_on_says_what_to_give(
    untrained: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = untrained("debug")
    config = json.loads((checkpoint / "processor.json").read_text())
    config["robots"]["robot"]["dataset"] = "data/gone"
    (checkpoint / "processor.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"give --data.* its demonstrations were data/gone"):
        main(["export", str(checkpoint), "--out", str(tmp_path / "exported")])
    with pytest.raises(SystemExit, match="--state_keys says how --data is read"):
        main(["export", str(checkpoint), "--out", str(tmp_path / "exported"), "--state_keys", STATE_KEYS])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", ["debug", "tiny"])
@pytest.mark.parametrize("format", ["openvino", "onnx", "pt2"])
def test_every_format_acts_as_the_policy(
    format: str, size: str, untrained: Untrained, videos: Path, in_a_fresh_process: Fresh, tmp_path: Path
) -> None:
    checkpoint, out = untrained(size), tmp_path / "exported"
    export(checkpoint, out, videos, "--format", format, "--max_error", "1e-4")
    seen = observation(action_dim=6 if size == "debug" else 8)
    absent = () if format == "pt2" else ("torch",)
    assert_acts_as(in_a_fresh_process(out, seen, absent), expected(checkpoint, seen))


@pytest.mark.slow
def test_export_beyond_the_bound_leaves_nothing(untrained: Untrained, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is not written: actions \(flow\) are off by .*, and max_error is 1e-12"):
        main(arguments(untrained("debug"), tmp_path / "exported", videos, "--max_error", "1e-12"))
    assert list(tmp_path.iterdir()) == []
