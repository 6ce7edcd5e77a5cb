"""The directory of a run, as fit, validate and rollout leave it, with few and known numbers in it."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

SWITCH = 6
SUCCESS = {
    "policy": {"reach-v3": [9, 10], "door-open-v3": [7, 10]},
    "random": {"reach-v3": [0, 10], "door-open-v3": [1, 10]},
}


FILM = {"mode": "policy", "task": "reach-v3", "seed": 2000007, "number": 7, "outcome": "out of time"}
ROLLOUT = {
    "success": SUCCESS,
    "failures": {"policy": {"reach-v3": {"out of time": 1}, "door-open-v3": {"out of time": 3}}, "random": {}},
    "milliseconds": {"policy": {"decision": {"median": 36.5, "p95": 88.7, "lanes": 3.8}}},
    "max_seconds": {"reach-v3": 6.0, "door-open-v3": 8.0},
    "acting": {"policy": {"noise_scale": 0.5, "execution_horizon": 2}},
    "per_minute": {"policy": 12.5},
    "groups": {
        "policy": {"easy": {"success": [3, 4], "tasks": 1}, "hard": {"success": [1, 4], "tasks": 1}},
        "random": {"easy": {"success": [0, 4], "tasks": 1}, "hard": {"success": [0, 4], "tasks": 1}},
    },
    "macro": {"policy": 0.5, "random": None},
    "delays": [],
    "env": "MetaWorld()",
    "seed": 0,
    "checkpoint": "runs/mine",
    "weights": "checkpoints/last.ckpt",
    "sha256": "c0ffee" * 10,
    "films": {"policy-reach-v3-0.mp4": FILM},
}


METRICS = {
    "robot/continuous_robot_actions": {
        "samples": 7,
        "action_mae": 0.125,
        "action_accuracy": 0.75,
        "action_mae/step_00": 0.1,
        "action_mae/step_01": 0.15,
        "action_accuracy/step_00": 0.8,
        "action_accuracy/step_01": 0.7,
        "action_mae/dim_00": 0.125,
    },
    "robot/qa": {"samples": 8, "exact_match": 0.875, "box_iou": None},
    "web/qa": {"samples": 8, "exact_match": 0.75, "box_iou": 0.5},
    "web_caption": {"samples": 0},
}
QUESTIONS = {"robot/qa": {"where is the red button?": {"samples": 4, "exact_match": 0.25}}}
EXAMPLES = [
    {"file": "robot-qa-worst-0.png", "group": "worst", "key": 4, "predicted": "left", "truth": "right"},
    {"file": "robot-qa-first-0.png", "group": "first", "key": 0, "predicted": "right", "truth": "right"},
]
PROVENANCE = {
    "started": "2026-01-01T10:00:00+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "command": "pi05 fit -c mine.yaml",
    "parameters": 2_000_000,
    "hardware": "1 × x86_64 cpu",
    "versions": {"pi05_lightning": "0.1.0", "torch": "2.11.0"},
    "samples": {"robot/qa": {"train": 90, "val": 8}},
}


def write_video(file: Path) -> None:
    """Eight frames that go from black to white."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("h264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for value in np.linspace(0, 255, 8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), value, dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "rollout").mkdir(parents=True)
    with SummaryWriter(str(folder)) as writer:
        for step in range(10):
            if step in (0, SWITCH):
                writer.add_scalar("stage", float(step == SWITCH), step)
            writer.add_scalar("loss/total", 1 / (step + 1), step)
    (folder / "config.yaml").write_text("seed_everything: 3\ndata: {sources: {robot: {}}, batch_size: 16}\n")
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    (folder / "validation").mkdir()
    (folder / "validation" / "examples.json").write_text(json.dumps({"robot/qa": EXAMPLES}))
    for shown in EXAMPLES:
        Image.new("RGB", (40, 30), "#336699").save(folder / "validation" / shown["file"])
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    (folder / "rollout" / "rollout.json").write_text(json.dumps(ROLLOUT))
    write_video(folder / "rollout" / "policy-reach-v3-0.mp4")
    return folder
