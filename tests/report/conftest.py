"""The directory of a run, as fit, validate and rollout leave it, with few and known numbers in it."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

SWITCH = 6
SUCCESS = {
    "policy": {"reach-v3": [9, 10], "door-open-v3": [7, 10]},
    "random": {"reach-v3": [0, 10], "door-open-v3": [1, 10]},
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
            writer.add_scalar("loss/total", 1 / (step + 1), step)
        for step in (0, SWITCH):
            writer.add_scalar("stage", float(step == SWITCH), step)
    (folder / "config.yaml").write_text("seed_everything: 3\ndata: {sources: {robot: {}}, batch_size: 16}\n")
    (folder / "metrics.json").write_text(json.dumps({"qa": {"exact_match": 0.875}}))
    (folder / "rollout" / "rollout.json").write_text(json.dumps({"success": SUCCESS}))
    write_video(folder / "rollout" / "policy-reach-v3-0.mp4")
    return folder
