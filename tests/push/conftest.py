"""A Hub on this machine, which huggingface_hub takes for the only one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .loopback_hub import Hub, reached


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with reached(tmp_path / "cache") as hub:
        yield hub
