"""Does stock LeRobot do with an export what the policy does? Its sizes, then prompts and actions on the same frames."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Frame
from pi05_lightning.weights.lerobot import PREFIX
from pi05_lightning.weights.lerobot_processor import STATE, lerobot_camera
from pi05_lightning.weights.safetensors import shapes_of

if TYPE_CHECKING:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy
    from lerobot.processor import PolicyProcessorPipeline

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Largest difference of an action, as a share of its range (`Quantiles.computed_unit`), that is rounding."""


@dataclass(frozen=True)
class ExpectedAnswers:
    """What a policy makes of observations."""

    frames: Sequence[Frame]
    tokens: Sequence[Sequence[int]]
    """Of each frame's prompt."""
    noise: Tensor
    """f32[N T D], which the chunks start from."""
    chunks: np.ndarray
    """f32[N T A], in the robot's units."""
    unit: np.ndarray
    """f64[A]: the range of each action, see `Quantiles.computed_unit`."""


def misfits(config: PI05Config, ours: ModelConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Why the model that LeRobot builds of its config.json is not of these tensors; it would load none of them.

    Nothing is allocated. What no tensor tells, the numbers of heads, is compared too.
    """
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    with torch.device("meta"):
        model = PI05Pytorch(config)
    theirs, found = shapes_of(model.state_dict(prefix=PREFIX)), shapes_of(tensors)
    every = theirs.keys() | found.keys()
    different = [key for key in every if theirs.get(key) != found.get(key)]
    towers = model.paligemma_with_expert
    vision, language = towers.paligemma.config.vision_config, towers.paligemma.config.text_config
    heads = {
        "vision": (ours.vision.num_heads, vision.num_attention_heads),
        "language": (ours.language.num_heads, language.num_attention_heads),
        "expert": (ours.expert.num_heads, towers.gemma_expert.config.num_attention_heads),
    }
    problems = [
        f"{part}.num_heads is {mine}, and LeRobot's is always {other}"
        for part, (mine, other) in heads.items()
        if mine != other
    ]
    if different:
        key = min(different, key=lambda key: (key not in found or key not in theirs, key))
        problems.append(
            f"LeRobot builds π0.5 in the published sizes alone: {len(different)} of {len(every)} tensors do not fit"
            f" (such as {key}, {list(found.get(key, ()))} and not {list(theirs.get(key, ()))}), and it would go on with"
            " random weights"
        )
    return problems


def open_lerobot(
    folder: Path, tokenizer: Any
) -> tuple[PI05Policy, PolicyProcessorPipeline[Any, Any], PolicyProcessorPipeline[Any, Any]]:
    """Stock LeRobot's policy and its two processors, as it opens them; tokenizer: the object that makes tokens."""
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy

    with redirect_stdout(io.StringIO()):
        policy = PI05Policy.from_pretrained(folder)
    overrides = {"tokenizer_processor": {"tokenizer": tokenizer}}
    return policy, *make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=overrides)


def differences(
    policy: PI05Policy,
    before: PolicyProcessorPipeline[Any, Any],
    after: PolicyProcessorPipeline[Any, Any],
    expected: ExpectedAnswers,
    tolerance: float,
) -> tuple[list[str], float]:
    """In what LeRobot's policy answers otherwise, by frame; and how far its actions are off at most, of their range."""
    problems, worst = [], 0.0
    for number, frame in enumerate(expected.frames):
        images = {
            key: torch.from_numpy(np.float32(frame.images[lerobot_camera(key)])) / 255
            for key in policy.config.image_features
            if lerobot_camera(key) in frame.images
        }
        state = np.zeros(0) if frame.state is None else frame.state  # LeRobot's has to have one
        batch = before({**images, STATE: torch.from_numpy(np.float32(state)), "task": frame.task})
        tokens = batch["observation.language.tokens"][batch["observation.language.attention_mask"]].tolist()
        if tokens != list(expected.tokens[number]):
            problems.append(
                f"frame {number}: LeRobot's prompt has {len(tokens)} tokens, the policy's"
                f" {len(expected.tokens[number])}, and they differ (task {frame.task[:40]!r})"
            )
        chunk = after(policy.predict_action_chunk(batch, noise=expected.noise[number, None])[0]).float().numpy()
        ours = expected.chunks[number]
        error = float((np.abs(chunk[: len(ours)] - ours) / expected.unit).max())
        worst = max(worst, error) if np.isfinite(error) else error
        if not error <= tolerance:
            problems.append(f"frame {number}: an action of LeRobot's is off by {error:.2g} of its range")
    return problems, worst


def lerobot_tokenizer(name: str) -> Any:
    """The tokenizer that LeRobot would load, from this machine. ValueError where it is not here."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {name!r}") from error


def as_lerobot_uses_it(tokenizer: TextTokenizer) -> Any:
    """A policy's own tokenizer as transformers' class, which begins a text with <bos> as PaliGemma's does."""
    from transformers import PreTrainedTokenizerFast

    copy = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
