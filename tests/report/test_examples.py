"""Examples are values: whoever only measures draws nothing."""

import subprocess
import sys

import pytest


@pytest.mark.slow  # imports Lightning
def test_the_module_needs_no_matplotlib() -> None:
    # Lightning's own dependency torchmetrics imports it, so what it imported is taken away after that
    script = (
        "import sys, lightning.pytorch\n"
        "sys.modules.update({name: None for name in sys.modules if name.split('.')[0] == 'matplotlib'})\n"
        "import pi05_lightning.module"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
