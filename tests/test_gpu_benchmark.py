"""`python -m benchmarks.gpu` where there is no GPU."""

import os
import subprocess
import sys


def test_without_a_gpu_the_benchmark_says_so_and_is_no_failure() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
