"""`pi05 value fit`: how an attempt will end, learned from attempts; with its calibration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from pi05_lightning.acting.device import check_device
from pi05_lightning.cli.run import run as run_trainer
from pi05_lightning.data.labels import RETURN, VALUE_FILE, Labels, fingerprint
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.experience.calibration import calibration, calibration_plot
from pi05_lightning.experience.page import PageSection, write_page
from pi05_lightning.experience.reading import TRAINER, Reading
from pi05_lightning.experience.value import AttemptDataset, ValueFunction, datasets_of, hash_of, longest_of, read_value
from pi05_lightning.files.local import check_writable, write_json, write_once, write_text
from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.heads.value import NAME, ValueHead
from pi05_lightning.training.run_directory import has_checkpoints
from pi05_lightning.weights.locate import locate

CALIBRATION = "calibration.json"


def value_fit(
    run: Path,
    *,
    policy: Path,
    rollouts: tuple[str, ...] = (),
    demonstrations: tuple[str, ...] = (),
    steps: int = 400,
    batch_size: int = 32,
    lr: float | None = None,
    c_fail: float | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
    options: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fit a value on attempts: from what a policy sees and is told, how far it is from success.

    It is a `pi05 fit` of a model of its own, which begins with the policy's weights; it is killed and resumed as that.
    It takes the policy's accelerator, precision, activation checkpointing and compiler, and one device.

    Args:
        run: directory of the value: a run of `pi05 fit`, and value.json, calibration.json and value.html.
        policy: checkpoint that it begins with, which says how the datasets are read.
        rollouts: LeRobot datasets of attempts that say how they ended, as those of `pi05 collect --policy`.
        demonstrations: LeRobot datasets whose episodes all succeeded, of the robot that made the attempts.
        steps: optimizer steps.
        batch_size: frames of a step.
        lr: learning rate; by default that which the policy was trained with, and at most 1e-3.
        c_fail: steps that a failure costs; by default as many as the longest episode of its task has.
        val_fraction: share of the episodes held out where a dataset declares none, for the calibration.
        seed: of the training.
        device: where the value runs for its calibration.
        options: further options of `pi05 fit`, as [--trainer.accelerator, gpu].

    Returns and writes the calibration on episodes that are held out.
    Raises ValueError where nothing says how an episode ended, where none is held out, and for a run that was begun with
    other options or on other episodes.
    """
    check_device(device)
    check_range("steps", steps, 1)
    check_range("batch_size", batch_size, 1)
    check_range("lr", lr, 0, above=True)
    check_range("seed", seed, 0)
    check_range("c_fail", c_fail, 0, above=True)
    check_writable(run, "run")
    datasets, reading = datasets_of(rollouts, demonstrations), Reading.of(policy)
    longest = longest_of(datasets)
    names = [
        f"{'demonstrations' if one.demonstrations else 'rollouts'}_{number}" for number, one in enumerate(datasets)
    ]
    folder = run / f"returns{'' if c_fail is None else f'_{c_fail:g}'}"
    sources = {}
    for name, one in zip(names, datasets, strict=True):
        shared = {} if name == names[0] else {"same_robot_as": names[0]}
        told = {"labels": str(folder / f"{name}.parquet"), "val_fraction": val_fraction, **shared}
        sources[name] = reading.source(one.path, datasets[0].path, one.collected, not one.demonstrations, **told)
    contents = "".join(f"# {one.path}: {fingerprint(one.files)}\n" for one in datasets)
    config = {"seed_everything": seed, **configuration(policy, reading, sources, steps, batch_size, lr)}
    begun = has_checkpoints(run)
    text = contents + yaml.safe_dump(config, sort_keys=False)
    write = partial(write_once if begun else write_text, run / "value.yaml", text)
    if begun:
        write()  # what the run has is not overwritten with other options' returns
    for name, one in zip(names, datasets, strict=True):
        returns = {RETURN: one.returns(longest, c_fail).astype(np.float32)}
        attempts = one.attempts
        Labels(attempts.episode, attempts.frame, returns, {}).write(folder / f"{name}.parquet", one.files)
    shapes = locate(policy).config().shapes
    held_out = (LeRobotConfig(**source["init_args"]).open(name, "val", shapes) for name, source in sources.items())
    if not any(map(len, held_out)):
        raise ValueError(
            f"val_fraction {val_fraction:g} holds out no episode, so nothing would tell how good the value is: raise"
            " it, or record more attempts"
        )
    write()
    run_trainer("fit", ["-c", str(run / "value.yaml"), "--run", str(run), "--resume", "auto", *options])
    about = {"longest": longest, "fps": datasets[0].files.fps, "c_fail": c_fail, "policy": str(policy)}
    about["datasets"] = [one.path for one in datasets]
    write_json(run / VALUE_FILE, {"sha256": hash_of(read_value(run)[1])} | about)
    return calibrate(ValueFunction(run, device), datasets, reading, val_fraction, run)


def configuration(
    policy: Path, reading: Reading, sources: dict[str, Any], steps: int, batch_size: int, lr: float | None
) -> dict[str, Any]:
    """A run of `pi05 fit` that trains the value alone, on what the policy sees before it has said anything."""
    stage = {
        "name": NAME,
        "steps": steps,
        "losses": {"others": {NAME: 1.0}},
        "mixture_temperature": 1.0,  # every frame of every dataset counts the same
        "freeze": ["flow_head"],
        "warmup_steps": min(20, steps),
    }
    machine = {name: option for name, option in reading.trainer.items() if name in ("accelerator", "precision")}
    return {
        "model": {
            "init_from": str(policy),
            "heads": {NAME: {"class_path": f"{ValueHead.__module__}.{ValueHead.__name__}"}},
            "optimizer": reading.adamw(lr),
            **{name: True for name in ("activation_checkpointing", "compile") if reading.model.get(name)},
        },
        "data": {
            "sources": sources,
            "cameras": list(reading.cameras),
            "tokenizer": reading.tokenizer,
            "language": reading.language | {"condition_on": "task", "task_only_share": 0.0, "fast_share": 0.0},
            "batch_size": batch_size,
            "num_workers": 1,
            "augmentation": None,
        },
        "stages": {"pretrain_steps": 0, "posttrain_steps": 0, "then": [stage]},
        "trainer": TRAINER | machine | {"devices": 1},
    }


def calibrate(
    value: ValueFunction, datasets: list[AttemptDataset], reading: Reading, val_fraction: float, run: Path
) -> dict[str, Any]:
    """The calibration on validation episodes, written as numbers and as a page.

    On those of attempts, where any is held out: beside demonstrations, which all succeeded, an attempt is told by who
    acted.
    """
    of_attempts, of_demonstrations = list[np.ndarray](), list[np.ndarray]()
    for one in datasets:
        read = reading.options(one.path, datasets[0].path, one.collected, attempts=not one.demonstrations)
        options = read | {"val_fraction": val_fraction}
        source = value.opened(one, "val", options)
        if len(source):
            rows, returns = one.rows(source), one.returns(value.longest, value.c_fail)
            seconds = one.scale(value.longest) / one.files.fps
            compared = np.stack([value.of(source), returns[rows], one.attempts.success[rows], seconds[rows]])
            (of_demonstrations if one.demonstrations else of_attempts).append(compared)
    kind = "attempts" if of_attempts else "demonstrations"
    predicted, returns, success, seconds = np.concatenate(of_attempts or of_demonstrations, axis=1)
    found = calibration(predicted, returns, success > 0, seconds)
    write_json(run / CALIBRATION, found)
    table = [["predicted", "actual", "frames"], *([f"{v:.3f}", f"{r:.3f}", str(n)] for v, r, n in found["bins"])]
    auc = "unknown, as all of them ended alike" if found["auc"] is None else f"{found['auc']:.3f}"
    said = (
        f"Of {found['frames']} frames of held-out {kind}: mean error {found['mean_error']:.3f} of a range of 1,"
        f" that of a constant {found['mean_error_of_a_constant']:.3f}; area under the ROC of success {auc}."
    )
    if found["mean_error_seconds"] is not None:
        said += f" Where an episode succeeded, the time to success is off by {found['mean_error_seconds']:.2f} s."
    figure = calibration_plot(predicted, returns, success > 0, seconds)
    write_page(run / "value.html", f"Value {run}", [PageSection("Calibration", [said], table, [figure])])
    Console().print(said, f"page {run / 'value.html'}", sep="\n", highlight=False)
    return found
