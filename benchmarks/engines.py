"""A chunk of an exported policy, with all that is said before it, against the same policy in PyTorch; no LeRobot."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Options, Row, alternate, run_part, speed_up
from benchmarks.serve import CAMERAS, DIMS, SUBTASKS, Served, make, served
from pi05_lightning.acting import Acting
from pi05_lightning.acting.inference import Inference
from pi05_lightning.cli.export import MAX_ERROR
from pi05_lightning.export.comparison import THREADS, act, compare
from pi05_lightning.export.folder import write
from pi05_lightning.export.formats import Format, Stored
from pi05_lightning.export.runner import Policy
from pi05_lightning.types import Frame
from pi05_lightning.weights.locate import locate

EXPORTS: tuple[tuple[str, Format, Stored], ...] = (
    ("OpenVINO", "openvino", "float32"),
    ("OpenVINO, int8 weights", "openvino", "int8"),
    ("ONNX Runtime", "onnx", "float32"),
)


def engines(options: Options) -> list[Row]:
    """A chunk of a policy in the engines that `pi05 export` writes for, against PyTorch."""
    return [row for policy in served(options.quick) for row in measure(policy, options)]


def measure(served: Served, options: Options) -> list[Row]:
    rng, size, rows = np.random.default_rng(0), served.config.vision.image_size, list[Row]()
    images = {camera: rng.integers(0, 256, (3, size, size), np.uint8) for camera in CAMERAS}
    frame = Frame(images=images, task=next(iter(SUBTASKS)), state=rng.uniform(-1, 1, DIMS).astype(np.float32))
    with tempfile.TemporaryDirectory() as made:
        make(served, Path(made))
        weights = locate(Path(made))
        ours = Inference(weights.model(torch.float32), weights.processor(), Acting(), trained=weights.trained)
        for name, format, stored in EXPORTS:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), ours, format, stored)
                found = compare(ours, Path(folder), [frame], format)
                print("\n".join(found.lines()), flush=True)
                if problems := found.problems(MAX_ERROR[stored]):
                    raise AssertionError(f"{served.name} in {name}: {'; '.join(problems)}")
                exported = Policy(folder, **{THREADS[format]: torch.get_num_threads()})
                seconds = alternate(partial(act, ours, frame), partial(chunk, exported, frame), options.pairs)
            rows.append(speed_up(f"one chunk, {served.name}, {name} against our PyTorch", "", seconds))
    return rows


def chunk(policy: Policy, frame: Frame) -> None:
    """The first chunk of an episode: it says its subtask too."""
    policy.reset()
    policy.act(frame.images, frame.state, frame.task)


if __name__ == "__main__":
    run_part(engines)
