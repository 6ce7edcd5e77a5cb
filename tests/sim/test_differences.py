"""A rollout looks at what its simulator gives before it runs, and says what the policy was not trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pi05_lightning.cli.rollout import rollout

SHORT = {"episodes": 1, "modes": ("policy",), "max_seconds": 0.1, "num_workers": 1, "videos": 0}


@pytest.mark.slow
def test_rollout_of_a_policy_that_saw_images_upside_down_says_so(
    untrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same, turned = (Path(shutil.copytree(untrained, tmp_path / name)) for name in ("same", "turned"))
    file = turned / "processor.json"
    content = json.loads(file.read_text())
    look = content["robots"]["robot"]["looks"]["topview"]
    look["mean"] = np.asarray(look["mean"])[:, ::-1].tolist()
    file.write_text(json.dumps(content))

    rollout(same, ["reach-v3"], **SHORT)
    assert not [m for m in caplog.messages if "pi05 check" in m]
    rollout(turned, ["reach-v3"], **SHORT)
    said = [m for m in caplog.messages if "pi05 check" in m]
    assert len(said) == 1
    assert "image topview: 28 × 28, upside down" in said[0]
