"""`pi05 convert`: checkpoints of LeRobot and openpi to ours, ours to LeRobot, every key accounted for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pi05_lightning.acting import Acting
from pi05_lightning.acting.frames import MADE_UP_FRAMES, dataset_config, made_up_frames, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.files.local import check_new, read_json, replacing
from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.folder import PROCESSOR, save
from pi05_lightning.weights.lerobot import EMBEDDING, EXPERT_LM_HEAD, LM_HEAD, PREFIX, lerobot_tensors
from pi05_lightning.weights.lerobot import to_lerobot as to_lerobot_key
from pi05_lightning.weights.lerobot_check import (
    TOLERANCE,
    ExpectedAnswers,
    as_lerobot_uses_it,
    differences,
    lerobot_tokenizer,
    misfits,
    open_lerobot,
)
from pi05_lightning.weights.lerobot_folder import Foreign, LeRobotFolder, summarize
from pi05_lightning.weights.lerobot_plugin import save_for_plugin
from pi05_lightning.weights.lerobot_processor import (
    PALIGEMMA,
    POSTPROCESSOR,
    PREPROCESSOR,
    inexpressible,
    read_processor,
    write_lerobot,
)
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.safetensors import (
    CONFIG,
    WEIGHTS,
    build,
    map_tensors,
    read_metadata,
    save_tensors,
    weight_files,
)

ORIGIN = "lerobot"
"""In a folder of ours that came from LeRobot: its own files, and the tensors that no loss reads, for the way back."""
UNREAD = "unread.safetensors"
LEROBOT_FILES = ("config.json", "train_config.json", "policy_*.json", "policy_*.safetensors")


def convert(
    *,
    source: Path,
    target: Path,
    format: Literal["ours", "lerobot", "plugin"] = "ours",
    tokenizer: str | None = None,
    vision_heads: int | None = None,
    horizon: int | None = None,
    fps: float | None = None,
    averaged: bool = True,
    robot: str | None = None,
    data: str | None = None,
    base: str | None = None,
    force: bool = False,
) -> None:
    """Convert a checkpoint and print what became of every key.

    What was written for LeRobot is opened by LeRobot, and has to answer as the policy does.

    Args:
        source: a folder with LeRobot's or openpi's (PyTorch) model.safetensors, its Hub id, a folder with openpi's
            (JAX) params and assets, or a checkpoint, run or folder of ours.
        target: the folder to make; it must not exist.
        format: what to make: a folder of ours, one of LeRobot's own pi05, or (`plugin`) one of any policy of ours that
            this package opens, and LeRobot with the plugin lerobot_policy_pi05_lightning.
        tokenizer: folder or name of the text tokenizer; by default what the source names, which is PaliGemma's.
        vision_heads: attention heads of SigLIP, which no file tells; by default 72 dimensions each.
        horizon: actions of a chunk, where no file tells, as of openpi's; by default 50. pi05_droid has 15, pi05_libero
            10.
        fps: actions per second of LeRobot's and openpi's weights, and of those converted without it, which no file
            tells. Without it nothing that asks for their rate is told one, and simulators take 50.
        averaged: of a training checkpoint, ours or openpi's, take the averaged weights if it has them.
        robot: keep this one of the policy's robots alone. LeRobot knows of one, so of several one must be named.
        data: LeRobot dataset on whose frames LeRobot's answers are compared with the policy's; by default the robot's
            own, if it is still where it was. Made-up frames are always compared too.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        force: write for LeRobot also what it will do otherwise than the policy, and say what that is.

    Raises ValueError for what cannot be converted, and for what LeRobot would do otherwise.
    """
    check_new(target, "--target")
    if format != "lerobot" and (given := [name for name, value in {"data": data, "force": force}.items() if value]):
        raise ValueError(f"{', '.join(given)}: of --format lerobot alone, which is compared with LeRobot: leave it out")
    check_range("fps", fps, 0, above=True)
    text = None if format == "lerobot" else tokenizer  # there it is what LeRobot's answers are compared with
    weights = locate(
        source,
        averaged=averaged,
        tokenizer=text,
        vision_heads=vision_heads,
        horizon=horizon,
        fps=fps,
        base=base,
    )
    with replacing(target, one_writer=True) as folder:
        folder.mkdir()
        if format == "lerobot":
            report = to_lerobot(weights, folder, Export(robot, tokenizer, data, force))
        elif format == "ours" and isinstance(weights, LeRobotFolder):
            report = from_lerobot(weights, folder, robot)
        else:
            report = to_ours(weights, folder, robot, plugin=format == "plugin")
    print("\n".join([*report, f"written to {target}"]))


def to_ours(weights: Weights, folder: Path, robot: str | None, *, plugin: bool) -> list[str]:
    """Write a folder of ours, of all robots or of one; returns the report.

    plugin: LeRobot opens it with the plugin, as one of the policy's robots.
    """
    processor = weights.processor()
    processor.keep_robot(processor.acting_as(robot) if plugin else robot)
    model = weights.model()
    if plugin:
        save_for_plugin(folder, model, processor, next(iter(processor.robots)), weights.trained)
    else:
        save(folder, model, processor, weights.trained)
        if (weights.path / ORIGIN).is_dir():
            shutil.copytree(weights.path / ORIGIN, folder / ORIGIN)
    return [*summarize((key, tensor, "as it is") for key, tensor in model.state_dict().items()), *weights.notes]


def from_lerobot(weights: LeRobotFolder, folder: Path, robot: str | None) -> list[str]:
    """Write a folder of ours, of LeRobot's or openpi's tensor by tensor from disk to disk; returns the report."""
    foreign = weights.mapped
    processor: Processor | None = None
    named = weights.named_tokenizer()
    try:
        text = TextTokenizer.load(named)
    except ValueError as error:
        if weights.tokenizer is not None or robot is not None:  # of what has no processor, no robot can be chosen
            raise
        notes = [
            f"written without {PROCESSOR}, as the tokenizer cannot be had: the weights are whole, a policy needs the"
            f" tokenizer too; convert again with --tokenizer FOLDER ({error})"
        ]
    else:
        processor, notes = read_processor(weights.path, foreign.config, text, weights.fps)
        processor.keep_robot(robot)
    save(folder, build(foreign.config, weights.mapped_tensors()), processor, weights.trained)
    keep_origin(weights.path, foreign, folder / ORIGIN)
    return [foreign.report(), *notes]


def keep_origin(source: Path, foreign: Foreign, origin: Path) -> None:
    """Keep LeRobot's own files, and of the tensors that no loss reads those that nothing else tells."""
    origin.mkdir()
    for pattern in LEROBOT_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, origin / file.name)
    # an lm_head that never drifted from the embedding is written again from it
    drifted = {
        key: tensor
        for key, tensor in foreign.unread.items()
        if key != PREFIX + LM_HEAD or not torch.equal(tensor, foreign.tensors[EMBEDDING])
    }
    files = weight_files(source)
    save_tensors(drifted, origin / UNREAD, read_metadata(files[0]) if files else None)


@dataclass(frozen=True)
class Export:
    """How a policy is written for LeRobot; see `convert`."""

    robot: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    force: bool = False

    def refuse(self, problems: list[str]) -> list[str]:
        """The problems, if they are to be put up with; otherwise ValueError that lists them."""
        if problems and not self.force:
            raise ValueError(
                "LeRobot would not act as this policy does:\n  "
                + "\n  ".join(problems)
                + "\n--force writes it nevertheless"
            )
        return [f"LeRobot will act otherwise: {problem}" for problem in problems]


def to_lerobot(weights: Weights, folder: Path, export: Export) -> list[str]:
    """Write a folder that LeRobot's `PI05Policy.from_pretrained` opens, and compare; returns the report."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    if isinstance(weights, LeRobotFolder):
        raise ValueError(f"{weights.path} is no checkpoint of ours: convert it to ours first, then to lerobot")
    if export.tokenizer is not None:  # what is wrong shows before gigabytes are written
        lerobot_tokenizer(export.tokenizer)
    if export.data is not None:
        find_dataset(export.data)
    origin = weights.path / ORIGIN
    came = origin.is_dir()
    # what came without a tokenizer goes as it came
    processor = None if came and not (weights.path / PROCESSOR).is_file() else weights.processor()
    robot = None if processor is None else processor.acting_as(export.robot)
    model = weights.model()
    unread = map_tensors(origin / UNREAD) if came else {}
    tensors = lerobot_tensors(model.state_dict(), unread)
    problems = []
    if processor is not None and robot is not None:
        problems = inexpressible(processor, robot, weights.trained)
    as_it_came = came and (processor is None or same_statistics(origin, model.config, processor))
    if processor is not None and robot is not None and not (as_it_came and is_whole(origin)):
        write_lerobot(folder, model.config, processor, robot, model.backbone.embed_tokens.weight.dtype)
    else:
        for file in origin.iterdir():
            if file.name != UNREAD:
                shutil.copyfile(file, folder / file.name)
    if not is_lerobots(folder):
        raise ValueError(
            f"{weights.path} came from openpi and without a tokenizer, so there is nothing to write LeRobot's files of:"
            " convert it to ours again with --tokenizer FOLDER"
        )
    config = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(config, PI05Config)
    unfit = misfits(config, model.config, tensors)
    notes = export.refuse([*unfit, *problems])
    save_tensors(tensors, folder / WEIGHTS, read_metadata(origin / UNREAD) if came else None)
    fate = {to_lerobot_key(key): f"<- {key}" for key in model.state_dict()}
    fate |= dict.fromkeys(unread, "<- kept aside when the checkpoint came")
    made = {PREFIX + LM_HEAD: "<- the embedding", PREFIX + EXPERT_LM_HEAD: "<- zeros, as no loss reads it"}
    lines = summarize((key, tensor, (made | fate)[key]) for key, tensor in tensors.items())
    executed = (
        f"LeRobot executes {config.n_action_steps} actions of a chunk, and `pi05 rollout` by default one:"
        " --policy.n_action_steps=1 makes them alike"
    )
    report = [*lines, f"{len(tensors)} keys", *weights.notes, executed, *notes]
    if processor is None or robot is None:
        return [*report, "not compared with the policy: it came without a tokenizer, so it is none"]
    if unfit:
        return [*report, "not compared with the policy: LeRobot cannot load the weights"]
    dtype = getattr(torch, config.dtype)
    del tensors  # maybe gigabytes, as are the model and LeRobot's own, which come one after the other
    acting = Acting(robot=robot, hierarchical=False, max_state_distance=None)  # LeRobot takes any state
    expected = answers_of(Inference(model.to(dtype), processor, acting), export.data)
    del model
    return [*report, *compare(folder, processor, expected, TOLERANCE[dtype], export)]


def answers_of(policy: Inference, data: str | None) -> ExpectedAnswers:
    """What a policy answers to frames of a dataset and to made-up ones, from fixed noise."""
    read = None if data is None else dataset_config(policy.processor.robots[policy.robot], data)
    frames = [*recorded_frames(policy, read), *made_up_frames(policy)]
    config, generator = policy.model.config, torch.Generator().manual_seed(0)
    noise = torch.randn(len(frames), config.horizon, config.action_dim, generator=generator)
    prompts = [policy.processor.prompt(frame, policy.robot).tokens.tolist() for frame in frames]
    chunks = [policy.predict_chunks([frame], [None], noise[[i]])[0] for i, frame in enumerate(frames)]
    unit = policy.processor.robots[policy.robot].normalize.action.computed_unit
    return ExpectedAnswers(frames, prompts, noise[:, : policy.horizon], np.stack(chunks), unit)


def compare(
    folder: Path, processor: Processor, expected: ExpectedAnswers, tolerance: float, export: Export
) -> list[str]:
    """Open an export with stock LeRobot and compare its answers with the policy's; returns what was found."""
    unverified = []
    try:
        tokenizer = lerobot_tokenizer(export.tokenizer or PALIGEMMA)
    except ValueError as error:
        if export.tokenizer is not None:
            raise
        tokenizer = as_lerobot_uses_it(processor.tokenizer)
        unverified = [
            f"not verified: that the policy's tokenizer is {PALIGEMMA}, which the export names ({error}); give it with"
            " --tokenizer FOLDER"
        ]
    problems, worst = differences(*open_lerobot(folder, tokenizer), expected, tolerance)
    notes = export.refuse(problems)
    compared = (
        f"compared with stock LeRobot on {len(expected.frames) - MADE_UP_FRAMES} recorded and {MADE_UP_FRAMES} made-up"
        f" frames: actions differ by {worst:.1g} of their range at most"
    )
    return [compared, *notes, *unverified]


def is_whole(origin: Path) -> bool:
    """Whether all is there that LeRobot opens a policy of, but for its weights."""
    return is_lerobots(origin) and all((origin / file).is_file() for file in (PREPROCESSOR, POSTPROCESSOR))


def is_lerobots(folder: Path) -> bool:
    """Whether a config.json is LeRobot's; openpi's, where there is one, names no type of policy."""
    return "type" in read_json(folder / CONFIG, default={})


def same_statistics(origin: Path, config: ModelConfig, processor: Processor) -> bool:
    """Whether LeRobot's files still say what the processor does; not after training on other data."""
    rates = {robot.fps for robot in processor.robots.values() if robot.fps_is_known}  # which they have no place for
    return read_processor(origin, config, processor.tokenizer, *rates)[0].to_dict() == processor.to_dict()
