"""Another kind of data: the very example of the docs, one class and one YAML entry, trains."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from pi05_lightning.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-dataset.md"


def block(start: str) -> str:
    found = re.search(rf"{start}(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's module, on the path."""
    (tmp_path / "stripes.py").write_text(block("```python\n# stripes.py\n"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stripes", raising=False)


@pytest.mark.usefixtures("module")
def test_the_example_trains_and_is_measured(tmp_path: Path) -> None:
    debug = {
        "model": {"config": "debug"},
        "data": {"batch_size": 2, "num_workers": 0, "val_samples": 2},
        "stages": {"pretrain_steps": 2, "posttrain_steps": 0},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    }
    (tmp_path / "debug.yaml").write_text(yaml.safe_dump(debug), encoding="utf-8")
    (tmp_path / "stripes.yaml").write_text(block("```yml\n# stripes.yaml\n"), encoding="utf-8")
    run = tmp_path / "run"
    main(["fit", "-c", str(tmp_path / "debug.yaml"), "-c", str(tmp_path / "stripes.yaml"), "--run", str(run)])
    assert list((run / "checkpoints").glob("*.ckpt"))
