"""LeRobot's policy processors (and openpi's statistics) as a `Processor` of ours, and back.

Both ask for actions with the prompt `Task: …, State: …;`, and normalise by what their checkpoint carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.data.transforms import Normalize, Quantiles, RelativeActions
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Frame
from pi05_lightning.weights.abilities import Abilities, Trained
from pi05_lightning.weights.safetensors import CONFIG, map_tensors

if TYPE_CHECKING:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

IMAGE, STATE, ACTION = "observation.images.", "observation.state", "action"
LONE_IMAGE = "observation.image"
"""LeRobot's key of the image of data and environments with one camera that has no name, as PushT and its MetaWorld."""

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
PALIGEMMA = "google/paligemma-3b-pt-224"
EULER_STEPS = 10  # what both sample a chunk with, where nothing else is said
PROMPT_TOKENS = 200  # what LeRobot cuts prompts to, where nothing else is said
FPS = 50.0  # π0.5's low level
_VARIANTS = ("gemma_300m", "gemma_2b")
ROBOT = "robot"  # LeRobot's checkpoints are of one robot and do not name it

RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"

CONVERTED_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    RELATIVE,
    ABSOLUTE,
    "normalizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "tokenizer_processor",
    "device_processor",
    "unnormalizer_processor",
}
"""LeRobot's names of the steps of its processors that the `Processor` does too."""

LEAST_STD = 1e-6  # as a share of the mean, or of 1
_RANGES = {"QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max"), "QUANTILE10": ("q10", "q90")}


def read_processor(
    folder: Path, config: ModelConfig, tokenizer: TextTokenizer, fps: float | None = None
) -> tuple[Processor, list[str]]:
    """The processor of a LeRobot or openpi checkpoint, and notes on what it does not say.

    fps: observations per second, which no file tells.

    ValueError for what is not converted: further steps of its processors, statistics that are incomplete or there
    twice, relative actions that config.json and the processors do not agree on.
    """
    values = read_json(folder / CONFIG, default={})
    steps = [step for file in (PREPROCESSOR, POSTPROCESSOR) for step in steps_of(folder, file)]
    if others := [step.name for step in steps if step.name not in CONVERTED_STEPS]:
        raise ValueError(f"{folder}: its processors have steps that are not converted: {', '.join(others)}")
    stats, notes = read_stats(folder, values, config)
    robots = {
        name: Robot(
            normalize,
            FPS if fps is None else fps,
            fps_is_known=fps is not None,
            relative=read_relative(folder, values, steps, len(normalize.state), len(normalize.action)),
            cameras=cameras(values),
        )
        for name, normalize in stats.items()
    }
    notes += [
        f"LeRobot renames observations, {step.config['rename_map']}: send them under the new names"
        for step in steps
        if step.config.get("rename_map")
    ]
    processor = Processor(
        config.shapes,
        tokenizer,
        cameras(values),
        robots,
        # unclipped, as both of them were trained
        Language(prompts=Prompts(clip_state=False), condition_on="task"),
    )
    if any(robot.relative for robot in robots.values()):
        notes.append(
            "LeRobot's select_action adds to every relative action the state of its own step, the policy that of the"
            " chunk's first step: of a chunk as a whole, or of its first action, they make the same"
        )
    if (num_steps := values.get("num_inference_steps", EULER_STEPS)) != EULER_STEPS:
        notes.append(f"LeRobot samples actions in {num_steps} steps: give the policy num_steps {num_steps}")
    # a processor's own length counts, and the config's where there is none
    lengths = [step.config["max_length"] for step in steps if "max_length" in step.config]
    length = min(lengths, default=values.get("tokenizer_max_length", PROMPT_TOKENS))
    if length < PROMPT_TOKENS:
        notes.append(f"LeRobot cuts prompts to {length} tokens, and the policy is given longer ones whole")
    if fps is None:
        notes.append(f"the control rate is in no file, and taken as {FPS:g} per second: `pi05 convert --fps` sets it")
    return processor, notes


@dataclass(frozen=True)
class Step:
    """A step of one of LeRobot's processors, as its JSON has it."""

    name: str
    config: Mapping[str, Any]
    state_file: str | None
    """The safetensors beside it, with its statistics."""


def steps_of(folder: Path, file: str) -> list[Step]:
    """The steps of a processor; none where the folder has no such file."""
    return [
        Step(step.get("registry_name") or str(step.get("class")), step.get("config", {}), step.get("state_file"))
        for step in read_json(folder / file, default={"steps": []})["steps"]
    ]


def read_relative(
    folder: Path, values: Mapping[str, Any], steps: Iterable[Step], state_dim: int, action_dim: int
) -> RelativeActions | None:
    """Dims of the action that LeRobot's policy predicts relative to the same dims of the state; None for none of them.

    ValueError where config.json (`values`) and the steps of the two processors, if there are any, differ about them.
    """
    configs = {step.name: step.config for step in steps}
    told = [bool(configs[name].get("enabled")) for name in (RELATIVE, ABSOLUTE) if name in configs]
    # older checkpoints have no such steps, and older configs no such key
    told += [False] * (2 - len(told)) if configs else []
    said = values.get("use_relative_actions", told[0] if told else False)
    if any(enabled != said for enabled in told):
        raise ValueError(
            f"{folder}: use_relative_actions is {str(said).lower()} in config.json, and {RELATIVE} and {ABSOLUTE} of"
            f" its processors are enabled otherwise: correct one of the two"
        )
    if not said:
        return None
    from lerobot.lerobot_types import TransitionKey
    from lerobot.processor import RelativeActionsProcessorStep, create_transition

    if state_dim < action_dim:
        raise ValueError(f"{folder}: its {action_dim} actions are relative to a state of {state_dim} dimensions")
    named = {
        "exclude_joints": values.get("relative_exclude_joints"),
        "action_names": values.get("action_feature_names"),
    }
    options = {key: configs.get(RELATIVE, named).get(key) for key in named}
    step = RelativeActionsProcessorStep(
        enabled=True, exclude_joints=options["exclude_joints"] or [], action_names=options["action_names"]
    )
    moved = step(create_transition({STATE: torch.ones(1, state_dim)}, torch.zeros(1, action_dim)))
    dims = tuple(moved[TransitionKey.ACTION][0].nonzero()[:, 0].tolist())
    return RelativeActions(dims, dims) if dims else None


def cameras(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a LeRobot policy's cameras, in its order; openpi's where the config has none."""
    features = values.get("input_features") or {}
    names = [lerobot_camera(key) for key, feature in features.items() if feature["type"] == "VISUAL"]
    return tuple(name for name in names if not name.startswith("empty_camera_")) or OPENPI_CAMERAS


def lerobot_camera(key: str) -> str:
    """The name of the camera of an image feature; `image` of the one without a name."""
    return key.removeprefix(IMAGE).removeprefix("observation.")


def image_keys(names: Sequence[str]) -> list[str]:
    """LeRobot's keys of the images of a robot's cameras.

    Only alone is `image` the camera without a name: LIBERO's two have the keys observation.images.image and .image2.
    """
    return [LONE_IMAGE] if list(names) == [lerobot_camera(LONE_IMAGE)] else [IMAGE + name for name in names]


def tokenizer_name(folder: Path) -> str:
    """What the checkpoint's preprocessor tokenizes with; PaliGemma's tokenizer where nothing is said.

    ValueError for two of them.
    """
    found = (step.config.get("tokenizer_name") for step in steps_of(folder, PREPROCESSOR))
    names = list(dict.fromkeys(name for name in found if name))
    if len(names) > 1:
        raise ValueError(f"{folder / PREPROCESSOR} names the tokenizers {', '.join(names)}: say which with --tokenizer")
    return names[0] if names else PALIGEMMA


# --- statistics


def read_stats(folder: Path, values: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Normalize], list[str]]:
    """What state and actions are normalised with, by robot: LeRobot's safetensors, or openpi's norm_stats.json."""
    assets = {path: read_json(path) for path in sorted(folder.glob("assets/**/norm_stats.json"))}
    files = {part: state_files(folder, part) for part in (PREPROCESSOR, POSTPROCESSOR)}
    if assets and any(files.values()):
        both = [*assets, *(file for found in files.values() for file in found)]
        raise ValueError(
            "statistics of openpi's and of LeRobot's: keep one kind of them, of " + ", ".join(map(str, both))
        )
    if assets:
        return {
            str(path.parent.relative_to(folder / "assets")): Normalize(
                _openpi_quantiles(stats, "state", path), _openpi_quantiles(stats, "actions", path)
            )
            for path, stats in assets.items()
        }, ["openpi has in no file whether actions are relative to the state (delta actions): taken as absolute"]
    tensors = read_once(files[PREPROCESSOR])
    # what LeRobot makes real units of; a preprocessor's are for training
    after = {name: x for name, x in read_once(files[POSTPROCESSOR]).items() if name.startswith(f"{ACTION}.")}
    if different := [name for name in after if name in tensors and not torch.equal(after[name], tensors[name])]:
        raise ValueError(
            f"{folder}: its two processors differ in the statistics {', '.join(different)}: correct the wrong one"
        )
    configured = {"STATE": "QUANTILES", "ACTION": "QUANTILES"} | (values.get("normalization_mapping") or {})
    # the processors' own count for LeRobot, which leaves alone what they do not name
    before, later = (
        [{"STATE": "IDENTITY", "ACTION": "IDENTITY"} | s.config["norm_map"] for s in steps if "norm_map" in s.config]
        for steps in (steps_of(folder, PREPROCESSOR), steps_of(folder, POSTPROCESSOR))
    )
    modes = before[0] if before else configured
    if later and later[0]["ACTION"] != modes["ACTION"]:
        raise ValueError(
            f"{folder}: ACTION is normalised by {modes['ACTION']} and made real units by {later[0]['ACTION']}: correct"
            f" one of {PREPROCESSOR} and {POSTPROCESSOR}"
        )
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY" and (shown := [name for name in tensors if IMAGE in name]):
        raise ValueError(f"{folder}: images are normalised by {modes['VISUAL']} ({shown[0]}), which is not converted")
    if only := sorted(after.keys() - tensors.keys()):
        raise ValueError(f"{folder}: {', '.join(only)} are in its {POSTPROCESSOR} alone: restore its {PREPROCESSOR}")
    features = {**(values.get("input_features") or {}), **(values.get("output_features") or {})}

    def quantiles(key: str, kind: str) -> Quantiles:
        stats = {
            name.removeprefix(f"{key}."): tensor.double().numpy()
            for name, tensor in tensors.items()
            if name.startswith(f"{key}.")
        }
        dims = features[key]["shape"][0] if key in features else config.action_dim
        found = _lerobot_quantiles(stats, modes[kind], key, dims)
        if key in features and len(found) != dims:
            raise ValueError(
                f"{folder}: config.json gives {key} {dims} dimensions, but its statistics have {len(found)}"
            )
        return found

    normalize = Normalize(quantiles(STATE, "STATE"), quantiles(ACTION, "ACTION"))
    notes = [] if tensors else [f"no statistics in {folder}: state and actions are taken as they are, as LeRobot does"]
    return {ROBOT: normalize}, notes


def state_files(folder: Path, file: str) -> list[Path]:
    """The safetensors of a processor: those that it names, or where it is not there itself, all that look like its."""
    if (folder / file).is_file():
        return [folder / step.state_file for step in steps_of(folder, file) if step.state_file]
    return sorted(folder.glob(f"{Path(file).stem}*.safetensors"))


def read_once(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of some files; ValueError for one that two of them have, and not the same."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = map_tensors(file)
        if different := [key for key in found if key in tensors and not torch.equal(found[key], tensors[key])]:
            raise ValueError(f"{file} holds other statistics than {file.parent} has beside it: {', '.join(different)}")
        tensors |= found
    return tensors


def _lerobot_quantiles(stats: Mapping[str, np.ndarray], mode: str, key: str, dims: int) -> Quantiles:
    """Every mode of LeRobot's is a linear map, and so a pair of values that go to -1 and 1."""
    if mode == "IDENTITY" or not stats:
        return Quantiles(np.full(dims, -1.0), np.ones(dims))
    needed = ("mean", "std") if mode == "MEAN_STD" else _RANGES[mode]
    if missing := [name for name in needed if name not in stats]:
        raise ValueError(f"{key} is normalised by {mode}, but its statistics lack {' and '.join(missing)}")
    first, second = (stats[name] for name in needed)
    if mode != "MEAN_STD":
        return Quantiles(first, second)
    std = np.maximum(second, LEAST_STD * np.maximum(np.abs(first), 1))  # else a constant is -1, and to LeRobot 0
    return Quantiles(first - std, first + std)


def _openpi_quantiles(stats: Mapping[str, Any], key: str, path: Path) -> Quantiles:
    values = stats.get("norm_stats", stats).get(key, {})
    if not values.get("q01") or not values.get("q99"):
        raise ValueError(f"{path}: {key} has no q01 and q99; π0.5 normalises by quantiles")
    return Quantiles(np.array(values["q01"], dtype=np.float64), np.array(values["q99"], dtype=np.float64))


# --- to LeRobot


def write_lerobot(
    folder: Path, config: ModelConfig, processor: Processor, robot: str, dtype: torch.dtype
) -> PI05Config:
    """LeRobot's config.json and both processors with the statistics of a robot; see `inexpressible`."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    size, normalize = config.vision.image_size, processor.robots[robot].normalize
    keys = image_keys(processor.cameras_of(robot))
    images = {key: PolicyFeature(FeatureType.VISUAL, (3, size, size)) for key in keys}
    experts = {
        variant
        for variant in _VARIANTS
        if all(getattr(modeling_pi05.get_gemma_config(variant), k) == v for k, v in vars(config.expert).items())
    }
    relative = processor.robots[robot].relative
    names_of_dims = [f"dim_{dim:03}" for dim in range(len(normalize.action))]
    steps = processor.robots[robot].horizon or config.horizon
    lerobot_config = PI05Config(
        use_relative_actions=relative is not None,
        relative_exclude_joints=[n for dim, n in enumerate(names_of_dims) if relative and dim not in relative.dims],
        action_feature_names=names_of_dims if relative else None,
        input_features={**images, STATE: PolicyFeature(FeatureType.STATE, (len(normalize.state),))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (len(normalize.action),))},
        action_expert_variant=min(experts, default=PI05Config.action_expert_variant),
        device="cpu",
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        chunk_size=steps,
        n_action_steps=steps,
        max_action_dim=config.action_dim,
        image_resolution=(size, size),
        tokenizer_max_length=max(PI05Config.tokenizer_max_length, longest_prompt(processor, robot)),
    )
    lerobot_config.save_pretrained(folder)
    save_pipelines(folder, lerobot_config, normalize)
    return lerobot_config


def longest_prompt(processor: Processor, robot: str) -> int:
    """Tokens of the longest prompt that the robot's own tasks make; LeRobot cuts off what is longer than it is told."""
    state = processor.robots[robot].normalize.state
    states = (state.q01 - state.span, state.q01, state.q99)  # bins -1, 0 and 255
    frames = [Frame(task=task, state=values) for task in processor.robots[robot].tasks for values in states]
    return max((len(processor.prompt(frame, robot).tokens) for frame in frames), default=0)


def save_pipelines(folder: Path, config: PI05Config, normalize: Normalize) -> None:
    """Write LeRobot's processors, before and after the policy, with their statistics."""
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
    from lerobot.processor import (
        AbsoluteActionsProcessorStep,
        RelativeActionsProcessorStep,
        TokenizerProcessorStep,
        make_default_policy_processor_steps,
    )
    from lerobot.processor.factory import make_policy_processor_pipelines

    stats = {
        key: {name: torch.from_numpy(getattr(quantiles, name)).float() for name in ("q01", "q99")}
        for key, quantiles in ((STATE, normalize.state), (ACTION, normalize.action))
    }
    steps = make_default_policy_processor_steps(config, stats)
    relative = RelativeActionsProcessorStep(
        config.use_relative_actions, config.relative_exclude_joints, config.action_feature_names
    )
    # the step takes any object; only its name is written, and PaliGemma's own need not be at hand for that
    tokenize = TokenizerProcessorStep(
        tokenizer=object(), max_length=config.tokenizer_max_length, padding_side="right", padding="max_length"
    )
    pipelines = make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            relative,
            steps.normalize,
            Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
            tokenize,
            steps.to_device,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(config.use_relative_actions, relative),
            steps.to_cpu,
        ],
    )
    for pipeline in pipelines:
        pipeline.save_pretrained(folder)
    for file in folder.glob("policy_*.safetensors"):  # safetensors makes a file for its owner alone
        file.chmod((folder / PREPROCESSOR).stat().st_mode)
    saved = read_json(folder / PREPROCESSOR)
    for step in saved["steps"]:
        if step["registry_name"] == "tokenizer_processor":
            step["config"]["tokenizer_name"] = PALIGEMMA
    write_json(folder / PREPROCESSOR, saved)


def inexpressible(processor: Processor, robot: str, trained: Trained) -> list[str]:
    """What of a policy LeRobot's π0.5 has no way to do, so that it would act otherwise."""
    prompts, problems = processor.language.prompts, []
    relative = processor.robots[robot].relative
    if relative is not None and relative.dims != relative.state_dims:
        problems.append(
            f"{robot}'s actions are relative to other dims of the state (relative_dims {list(relative.dims)},"
            f" relative_state_dims {list(relative.state_dims)}), and LeRobot's to the same ones"
        )
    if relative is not None and processor.robots[robot].state_dim < processor.robots[robot].action_dim:
        problems.append(
            f"{robot} has relative actions, for which LeRobot's state has to have as many dims as its action"
        )
    if processor.predicts_subtasks(robot):
        problems.append(
            "the policy acts on subtasks that it says itself, and LeRobot's on the task alone: train with"
            " data.language.condition_on: task"
        )
    if processor.language.untold:
        problems.append("the policy is told no task (data.language.no_task_share: 1), and LeRobot's always is")
    if prompts.action != Prompts.action:
        problems.append(f"LeRobot's prompt is {Prompts.action!r}, and the policy's is {prompts.action!r}")
    if prompts.clip_state:
        problems.append(
            "LeRobot writes a state below its first quantile as the bin -1, the policy was trained with 0: train with"
            " data.language.prompts.clip_state: false"
        )
    if not processor.robots[robot].state_dim:
        problems.append("the policy was trained without a state, which LeRobot's prompt has to have")
    if Abilities.of(processor, trained).advantage:
        problems.append(
            "the policy is told the advantage of its actions, which LeRobot's prompt has no place for: there it acts as"
            " with --advantage none"
        )
    if not trained.able("flow"):
        problems.append("the policy's flow head was not trained, and LeRobot takes no actions from anything else")
    return problems
