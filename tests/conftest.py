"""What all tests share: one thread per process, and small real LeRobot datasets, recorded once per session by LeRobot.

The tests run in several processes, and threads that wait for each other's cores cost a hundredfold. Tests that damage a
dataset take a copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

LONG = 30  # seconds
SCHEDULED = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Iterator[None]:
    result = yield
    share_the_core()
    return result


def pytest_runtest_teardown() -> None:
    share_the_core()


def share_the_core() -> None:
    """Be scheduled as at first. Under root, SVT-AV1 makes the thread that encodes a video a real-time one (FIFO 99).

    LeRobot records with it. That thread, and the processes that it forks, would then hold up all others.
    """
    if SCHEDULED and (os.sched_getscheduler(0), os.sched_getparam(0)) != SCHEDULED:
        os.sched_setscheduler(0, *SCHEDULED)


@pytest.hookimpl(tryfirst=True)  # before the tests of -m are chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow_cases") and any(item.callspec.indices.values()):
            item.add_marker("slow")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Says at once which test took long: a run that is cut off shows no list of durations."""
    if report.duration > LONG and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} {report.when} {report.duration:.0f} s", flush=True)


FPS = 10
LENGTHS = (12, 9, 15, 7, 11)
HEIGHT, WIDTH = 48, 64
CAMERAS = ("top", "wrist")


def _picture(episode: int, frame: int, camera: int) -> np.ndarray:
    """A gradient with a square whose place tells episode and frame."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([x * 3, y * 4, np.full_like(x, 60 * camera + 10 * episode)], axis=-1).astype(np.uint8)
    left = 3 * frame + camera
    image[8 + 4 * episode : 16 + 4 * episode, left : left + 8] = 255
    return image


def _record(root: Path, dtype: str, cameras: tuple[str, ...]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        f"observation.images.{name}": {
            "dtype": dtype,
            "shape": (HEIGHT, WIDTH, 3),
            "names": ["height", "width", "channels"],
        }
        for name in cameras
    }
    features["observation.state"] = {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]}
    features["observation.gripper"] = {"dtype": "float32", "shape": (1,), "names": ["width"]}
    features["action"] = {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]}
    dataset = LeRobotDataset.create("pi05/recorded", FPS, features, root=root, use_videos=dtype == "video")
    rng = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            images = {f"observation.images.{name}": _picture(episode, frame, i) for i, name in enumerate(cameras)}
            numbers = {
                "observation.state": rng.normal(size=3).astype(np.float32),
                "observation.gripper": rng.normal(size=1).astype(np.float32),
                "action": np.array([episode, frame], dtype=np.float32),
            }
            dataset.add_frame({**images, **numbers, "task": "open the drawer" if episode % 2 else "close the drawer"})
        dataset.save_episode()
    dataset.finalize()


def _annotate(root: Path) -> None:
    """Subtasks from frame 2 on, changing at frame 7; two questions about `top` and one about `wrist` on frame 3."""
    from lerobot.datasets.io_utils import write_table_one_row_group_per_episode
    from lerobot.datasets.language import language_feature_info

    names = ("role", "content", "style", "camera")
    event = [*((name, pa.string()) for name in names), ("tool_calls", pa.list_(pa.string()))]
    types = [pa.list_(pa.struct([*event[:3], ("timestamp", pa.float64()), *event[3:]])), pa.list_(pa.struct(event))]

    def row(role: str, content: str, style: str, camera: str | None = None, **more: float) -> dict:
        return {"role": role, "content": content, "style": style, **more, "camera": camera, "tool_calls": None}

    def persistent(episode: int) -> list[dict]:
        return [
            row("assistant", f"reach {episode % 2}", "subtask", timestamp=0.2),
            row("assistant", "an overall plan", "plan", timestamp=0.2),
            row("assistant", f"pull {episode % 2}", "subtask", timestamp=0.7),
        ]

    def events(frame: int) -> list[dict]:
        if frame != 3:
            return []
        top, wrist = "observation.images.top", "observation.images.wrist"
        return [  # answers first, as LeRobot's own writer sorts them
            row("assistant", "<loc0001><loc0002><loc0003><loc0004>", "vqa", top),
            row("assistant", "red", "vqa", top),
            row("assistant", "no", "vqa", wrist),
            row("user", "detect the handle", "vqa", top),
            row("user", "what colour is it?", "vqa", top),
            row("user", "is it closed?", "vqa", wrist),
            row("user", "please hurry", "interjection"),
        ]

    for path in (root / "data").glob("*/*.parquet"):
        table = pq.read_table(path)
        episodes, frames = table["episode_index"].to_pylist(), table["frame_index"].to_pylist()
        columns = [persistent(e) for e in episodes], [events(f) for f in frames]
        for name, rows, kind in zip(("language_persistent", "language_events"), columns, types, strict=True):
            table = table.append_column(name, pa.array(rows, kind))
        write_table_one_row_group_per_episode(table, path)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"] |= language_feature_info()
    (root / "meta" / "info.json").write_text(json.dumps(info))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test leaves in the environment, such as the port of its ranks, is gone for the next one."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cameras as video, subtasks and questions in the language columns; read only."""
    root = tmp_path_factory.mktemp("recorded") / "videos"
    _record(root, "video", CAMERAS)
    _annotate(root)
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One camera as images in the parquet files, no language columns; read only."""
    root = tmp_path_factory.mktemp("recorded") / "pictures"
    _record(root, "image", CAMERAS[:1])
    return root


@pytest.fixture(scope="session")
def three_cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pictures`, with three cameras."""
    root = tmp_path_factory.mktemp("recorded") / "three_cameras"
    _record(root, "image", ("top", "left", "wrist"))
    return root


@pytest.fixture(scope="session")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FAST tokenizer for chunks of the debug model's horizon and the datasets' two dims."""
    from pi05_lightning.models.config import ModelConfig
    from tests.random_fast import random_fast

    sizes, folder = ModelConfig.preset("debug"), tmp_path_factory.mktemp("fast")
    random_fast(sizes, scale=3).save(folder)
    return folder


@pytest.fixture
def videos_copy(videos: Path, tmp_path: Path) -> Path:
    """A copy of `videos` to damage."""
    return Path(shutil.copytree(videos, tmp_path / "copy"))


@pytest.fixture
def pictures_copy(pictures: Path, tmp_path: Path) -> Path:
    """A copy of `pictures` to damage, without the statistics that other tests left there."""
    return Path(shutil.copytree(pictures, tmp_path / "copy", ignore=shutil.ignore_patterns("pi05_*")))
