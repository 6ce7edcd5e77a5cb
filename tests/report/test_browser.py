"""The page and TensorBoard in headless Chromium; skipped where there is none."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from pi05_lightning.cli.report import report
from pi05_lightning.recipe import Recipe
from pi05_lightning.training.callbacks.dashboard import layout

TOOL = Path(__file__).parents[2] / "tools" / "browser.py"
spec = importlib.util.spec_from_file_location("browser", TOOL)
assert spec is not None
assert spec.loader is not None
browser: Any = importlib.util.module_from_spec(spec)
sys.modules["browser"] = browser  # dataclasses look their module up
spec.loader.exec_module(browser)

pytestmark = pytest.mark.skipif(
    browser.find_browser() is None,
    reason="no Chromium or Chrome on this machine (Debian, Ubuntu: apt install chromium)",
)


@pytest.fixture
def visited(run: Path) -> Any:
    return browser.visit(report(run).as_uri())


def test_page_opens_without_errors_images_load_and_videos_play(visited: Any) -> None:
    assert visited.errors == []
    assert visited.images
    assert all(there for _, there in visited.images)
    assert visited.videos == [True]
    assert visited.played == [True]
    assert visited.requests == []


def test_missing_image_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img alt="gone" src="gone.png"><video src="gone.mp4"></video><script>throw Error("no")</script>')
    visited = browser.visit(page.as_uri())
    assert visited.images == [["gone", False]]
    assert visited.videos == [False]
    assert any("no" in error for error in visited.errors)


@pytest.fixture
def tensorboard(run: Path) -> Iterator[str]:
    """TensorBoard's address, with our layout over the run."""
    with SummaryWriter(str(run)) as writer:
        writer.add_custom_scalars(layout(Recipe.of()))
        writer.add_scalar("lr/decay", 1e-3, 1)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"http://\S+", line)
            if found:
                yield found[0]
                break
        else:
            pytest.fail("TensorBoard did not start")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_tensorboard_shows_the_topics_of_our_layout(tensorboard: str) -> None:
    visited = browser.visit(f"{tensorboard}#custom_scalars", seconds=15)
    assert [error for error in visited.errors if "favicon" not in error] == []
    for topic in layout(Recipe.of()):
        assert topic in visited.text
