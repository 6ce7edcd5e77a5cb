"""The Hub's cache in the place of the Hub, as it is to anyone without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789" * 4


def hold_in_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder into a new cache as `lab/arm`, and use that without a network; returns where its snapshots are."""
    repository = cache / "models--lab--arm"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots"
