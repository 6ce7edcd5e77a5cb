"""`pi05 check`: what a policy expects beside what a dataset or a simulator gives, before any rollout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from tqdm import tqdm

from pi05_lightning.acting import Acting
from pi05_lightning.acting.device import check_device
from pi05_lightning.acting.frames import dataset_config
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.evaluation.agreement import Counterpart, Finding, agreement, compare_predictions, differs
from pi05_lightning.evaluation.report.tables import table_of
from pi05_lightning.experience.reading import Reading
from pi05_lightning.files.ranges import check_range
from pi05_lightning.sim.environment import EnvironmentConfig, View, tasks_to_run
from pi05_lightning.sim.glimpse import beside_simulator
from pi05_lightning.sim.simulators import Desk, LeRobotEnv, Libero, MetaWorld  # noqa: F401 - what --env knows by name
from pi05_lightning.weights.abilities import Abilities
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.locate import locate

STYLES = {"ok": "green", "differs": "bold red", "unknown": "yellow"}


def check(
    checkpoint: Path,
    dataset: str | None = None,
    env: EnvironmentConfig | None = None,
    robot: str | None = None,
    cameras: dict[str, str] | None = None,
    state_keys: list[str] | None = None,
    action_keys: list[str] | None = None,
    frames: int = 16,
    tasks: list[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    tokenizer: str | None = None,
    base: str | None = None,
) -> None:
    """Compare what a policy expects with what a dataset or a simulator gives; exit status 1 where anything differs.

    Cameras, their images (turned, mirrored, red and blue swapped, proportions), state and actions (dims, units, signs,
    ranges), rate, chunks, instructions, statistics and heads, each with what the policy would do and how to mend it.

    Args:
        checkpoint: a .ckpt, a run's directory, an exported folder, LeRobot's or openpi's.
        dataset: a LeRobot dataset, a folder or Hub id; by default, where no env is given, the policy's demonstrations.
        env: a simulator: MetaWorld, MT50, Desk, Libero, LeRobotEnv, or an EnvironmentConfig of your own by its
            import path.
        robot: the data source whose robot it acts as, where the policy was trained on several.
        cameras: image features of the dataset, each with its camera name, as in training.
        state_keys: features that make the state; by default those that it was trained on.
        action_keys: features that make the action; by default those that it was trained on.
        frames: frames of the dataset at which the policy is asked, to compare its actions with what was done; 0: none.
        tasks: the simulator's tasks; by default the first few that a rollout would run.
        seed: of the noise.
        device: where the policy runs.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
    """
    check_range("frames", frames, 0)
    check_range("seed", seed, 0)
    check_device(device)
    of_data = {"cameras": cameras, "state_keys": state_keys, "action_keys": action_keys}
    check_effect(dataset, env, [name for name, value in of_data.items() if value is not None], tasks)
    print(f"opening {checkpoint} …", flush=True)
    weights = locate(checkpoint, tokenizer=tokenizer, base=base)
    processor = weights.processor()
    name = processor.acting_as(robot)
    policy = replace(processor.robots[name], cameras=processor.cameras_of(name))
    if dataset is None and env is None:
        if not policy.dataset:
            raise ValueError("nothing to compare with: give --dataset or --env")
        dataset = policy.dataset
    found: list[Finding] = []
    if dataset is not None:
        chosen = dataset_config(policy, dataset, cameras, state_keys, action_keys)
        if all(value is None for value in of_data.values()):
            chosen = replace(chosen, **as_trained(checkpoint, dataset))
        said = beside_dataset(weights, processor, name, policy, chosen, frames, seed, device)
        show(f"{checkpoint} beside {dataset}", said)
        found += said
    if env is not None:
        abilities, horizon = Abilities.of(processor, weights.trained), policy.horizon or weights.config().horizon
        view = View(policy.cameras or (), processor.shapes.image_size, policy.fps)
        said = beside_simulator(policy, abilities, horizon, env, tasks_to_run(env, tasks, policy), view)
        show(f"{checkpoint} beside {type(env).__name__}", said)
        found += said
    if differs(found):
        sys.exit(1)


READ = ("cameras", "state_keys", "action_keys", "task", "episodes", "subtask_key", "box_range")


def as_trained(checkpoint: Path, dataset: str) -> dict[str, Any]:
    """How the run of a checkpoint read a dataset, as far as it was one of its own and that is known."""
    try:
        run = Reading.of(checkpoint)
    except ValueError:  # a folder carries no run's configuration
        return {}
    if run.name_of(dataset) is None:
        return {}
    return {key: value for key, value in run.options(dataset, dataset).items() if key in READ and value is not None}


def check_effect(
    dataset: str | None, env: EnvironmentConfig | None, of_data: Sequence[str], tasks: Sequence[str] | None
) -> None:
    """ValueError for options without effect: of a dataset where a simulator is looked at, and the other way round."""
    if of_data and env is not None and dataset is None:
        raise ValueError(f"{of_data[0]} says how a dataset is read, and env is a simulator: give --dataset too")
    if env is None and tasks is not None:
        raise ValueError("tasks are a simulator's: give --env too, or leave them out")


REFUSED = {"cameras", "state", "action"}
"""What no prediction can be made, or compared, with."""


def beside_dataset(
    weights: Weights,
    processor: Processor,
    name: str,
    policy: Robot,
    chosen: LeRobotConfig,
    frames: int,
    seed: int,
    device: str,
) -> list[Finding]:
    """What there is to say of a policy, which acts as the robot of a name, and a dataset."""
    abilities, horizon = Abilities.of(processor, weights.trained), weights.config().horizon
    source = open_dataset(replace(chosen, horizon_steps=policy.horizon), policy, horizon)
    here = source.robot()
    assert here is not None
    here = replace(here, looks=source.looks(), cameras=tuple(source.camera_names))
    episodes = np.unique(source.episode, return_counts=True)[1]
    counterpart = Counterpart(
        here, chosen.path, episode_seconds=float(episodes.max()) / here.fps, features=source.cameras
    )
    said = agreement(policy, abilities, policy.horizon or horizon, counterpart)
    if frames and abilities.robots and not any(f.verdict == "differs" and f.what in REFUSED for f in said):
        said += predictions(weights, processor, name, abilities, source, frames, seed, device)
    return said


def open_dataset(config: LeRobotConfig, policy: Robot, horizon: int) -> LeRobotSource:
    """The dataset, its actions relative in the dims that the policy's are, where it has such dims."""
    relative, features = policy.relative, LeRobotFiles.open(find_dataset(config.path)).features
    widths = [
        sum(features[k]["shape"][0] for k in keys if k in features) for keys in (config.action_keys, config.state_keys)
    ]
    if relative and max(relative.dims) < widths[0] and max(relative.state_dims) < widths[1]:
        config = replace(config, relative_dims=list(relative.dims), relative_state_dims=list(relative.state_dims))
    return LeRobotSource(config, config.path, "train", horizon, (0, 0))


def predictions(
    weights: Weights,
    processor: Processor,
    robot: str,
    abilities: Abilities,
    source: LeRobotSource,
    frames: int,
    seed: int,
    device: str,
) -> list[Finding]:
    """Ask the policy at frames from all over a dataset."""
    acting = Acting(
        robot=robot, actions="flow" if abilities.flow else "fast", max_state_distance=None, hierarchical=False
    )
    policy = Inference(weights.model().to(device), processor, acting, seed, weights.trained)
    wanted, relative = policy.inputs.cameras, processor.robots[robot].relative
    predicted, recorded = list[np.ndarray](), list[np.ndarray]()
    for index in tqdm(evenly_spaced(len(source), frames), unit="frame", desc="asking"):
        try:
            frame = source[int(index)]
        except BadSample:  # as training leaves it out
            continue
        assert frame.actions is not None
        assert frame.action_is_pad is not None
        shown = replace(frame, images={camera: frame.images[camera] for camera in wanted}, actions=None)
        chunk = policy.predict_chunks([shown], [frame.subtask])[0]
        real = ~frame.action_is_pad[: len(chunk)]
        for actions, those in ((chunk, predicted), (frame.actions[: len(chunk)], recorded)):
            those.append(actions[real] if relative is None else relative.offsets(actions[real], shown))
    if not predicted:
        raise ValueError(f"{source.config.path}: none of {frames} frames can be read: restore its images")
    return compare_predictions(predicted, recorded, processor.robots[robot])


def show(title: str, findings: Sequence[Finding]) -> None:
    """A table, and below it what each difference leads to."""
    console = Console()
    table = table_of(title, ["", "", "the policy expects", "it is given"])
    for finding in findings:
        style = STYLES[finding.verdict]
        told = map(escape, (finding.expected, finding.given))
        table.add_row(finding.what, f"[{style}]{finding.verdict}[/]", *told)
    console.print(table)
    for finding in findings:
        if finding.verdict == "differs":
            console.print(str(finding), highlight=False, markup=False)
