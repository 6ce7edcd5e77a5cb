"""`pi05 export`: a policy for other engines, compared with itself before it is written."""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pi05_lightning import __version__
from pi05_lightning.acting import Acting, check
from pi05_lightning.acting.frames import dataset_config, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.export.comparison import compare
from pi05_lightning.export.folder import CALLERS, MANIFEST, write
from pi05_lightning.export.formats import Format, Stored, needed
from pi05_lightning.files.local import check_new, replacing, write_json
from pi05_lightning.files.ranges import check_range
from pi05_lightning.types import Frame
from pi05_lightning.weights.locate import locate

log = logging.getLogger(__name__)

MAX_ERROR: dict[Stored, float] = {"float32": 1e-3, "int8": 0.05, "int4": 0.3}
"""Of an action, normalised to -1..1: some more than the demo's policy has."""


def export(
    checkpoint: Path,
    *,
    out: Path,
    format: Format = "openvino",
    dtype: Stored = "float32",
    data: str | None = None,
    cameras: dict[str, str] | None = None,
    state_keys: list[str] | None = None,
    action_keys: list[str] | None = None,
    frames: int = 8,
    max_error: float | None = None,
    averaged: bool = True,
    base: str | None = None,
    tokenizer: str | None = None,
    **acting: Any,
) -> None:
    """Export a policy to OpenVINO, ONNX or PyTorch's pt2, with a runner that needs neither this package nor Lightning.

    The folder holds the graphs, manifest.json (checksums, statistics, prompts, dimensions, how it acts), the tokenizer
    and runner.py, which loads them: `Policy().act(images, state, task)` gives actions, `Policy().subtask` what it said
    before. It is compared with PyTorch on frames of data first, and nothing is written where it acts otherwise.

    Args:
        checkpoint: a .ckpt, a run's directory, an exported folder, LeRobot's or openpi's.
        out: the folder to make; it must not exist.
        format: openvino and onnx are run by OpenVINO and ONNX Runtime, pt2 by PyTorch.
        dtype: what weights are stored in; int8 and int4 are for openvino, and take a quarter and less of the space.
        data: LeRobot dataset on whose frames they are compared; by default the policy's demonstrations.
        cameras: image features of the dataset, each with its camera name, as in training.
        state_keys: features that make the state; by default those that it was trained on.
        action_keys: features that make the action; by default those that it was trained on.
        frames: how many frames are compared, evenly spaced over the dataset.
        max_error: of an action, normalised to -1..1, beyond which nothing is written; also where a subtask differs. By
            default 0.001, with int8 0.05, with int4 0.3.
        averaged: of a training checkpoint, take the averaged weights if it has them.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        acting: how the policy acts, see `Acting`; num_steps and robot are fixed by the export. What is executed of a
            chunk, and when the next is computed, is up to the program that calls the runner: execution_horizon,
            inference_delay, rtc and on_failed_decode are refused.

    Raises ValueError for what cannot be exported or compared, and where the exported policy acts otherwise.
    """
    how = Acting(**acting)
    for name in CALLERS:
        if getattr(how, name) != getattr(Acting(), name):
            raise ValueError(
                f"--{name} has no effect on an exported policy, whose `act` gives whole chunks or raises: leave it out,"
                " and execute as much of a chunk as you want where you call it (`prefix_actions` go on from the last)"
            )
    of_data = {"--cameras": cameras, "--state_keys": state_keys, "--action_keys": action_keys}
    check_new(out, "--out")
    if data is None and (given := [name for name, value in of_data.items() if value is not None]):
        raise ValueError(f"{given[0]} says how --data is read: give that too, or leave it out")
    check_range("--frames", frames, 1)
    check_range("--max_error", max_error, 0)
    if missing := [name for name in needed(format, dtype) if find_spec(name) is None]:
        raise ValueError(f"this export needs {' and '.join(missing)}: pip install 'pi05-lightning[export]'")
    print(f"opening {checkpoint} …", flush=True)
    weights = locate(checkpoint, averaged=averaged, base=base, tokenizer=tokenizer)
    processor = weights.processor()
    check(how, processor, weights.trained)
    processor.keep_robot(processor.acting_as(how.robot))
    policy = Inference(weights.model(torch.float32), processor, how, trained=weights.trained)
    robot = processor.robots[policy.robot]
    read = None if data is None else dataset_config(robot, data, cameras, state_keys, action_keys)
    seen = frames_of(policy, read, frames)
    with replacing(out, one_writer=True) as folder:
        folder.mkdir()
        print(f"writing the graphs for {format} …", flush=True)
        manifest = write(folder, policy, format, dtype)
        found = compare(policy, folder, seen, format)
        print("\n".join(found.lines()))
        if problems := found.problems(MAX_ERROR[dtype] if max_error is None else max_error):
            raise ValueError(f"{checkpoint} as {format} is not the policy, and is not written: {'; '.join(problems)}")
        made_of = {"sha256": weights.content_hash(), "pi05_lightning": __version__}
        write_json(folder / MANIFEST, manifest | {"policy": made_of, "compared": asdict(found)})
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"written to {out}: {size / 1e6:,.1f} MB; `from runner import Policy` in it needs no pi05_lightning")


def frames_of(policy: Inference, data: LeRobotConfig | None, number: int) -> list[Frame]:
    """Frames to compare on. ValueError where there are none."""
    found = recorded_frames(policy, data, number)
    if not found:
        known = policy.processor.robots[policy.robot].dataset
        raise ValueError(
            "nothing to compare on: give --data, a LeRobot dataset of the policy's robot (with --cameras, --state_keys"
            f" and --action_keys as in training); its demonstrations were {known or 'not recorded'}"
            + (", which is not here, or was read in another way" if known else "")
        )
    return found
