"""A checkpoint that LeRobot itself wrote, what it became as ours, and what that became on the way back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import TokenizerProcessorStep, make_default_policy_processor_steps
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.processor.factory import make_policy_processor_pipelines
from lerobot.processor.pipeline import PolicyProcessorPipeline
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.peer import lerobot_sizes, randomize
from benchmarks.sizes import DEBUG as CONFIG
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.tokenizer import TextTokenizer

EMBED_TOKENS = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
STATE_DIM, ACTION_DIM = 4, 3
Copy = Callable[[Callable[[dict[str, Tensor]], object]], Path]
Predict = Callable[[dict, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the Hub has them, with the shipped tokenizer; as PaliGemma's it begins a text with <bos>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shipped = TextTokenizer.load("tiny").tokenizer
    shipped.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", shipped.token_to_id("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=shipped, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def export(source: Path, target: Path, **options: Any) -> None:
    """Convert to LeRobot, which has our sizes meanwhile; the comparison with it is part of that."""
    with lerobot_sizes(CONFIG):
        convert(source=source, target=target, format="lerobot", **options)


def open_lerobot(folder: Path) -> PI05Policy:
    with lerobot_sizes(CONFIG):
        return PI05Policy.from_pretrained(folder)


def between_processors(folder: Path, overrides: dict | None = None) -> Predict:
    """LeRobot's policy between the folder's processors: (observation, noise) to tokens and actions in real units."""
    policy = open_lerobot(folder)
    before = PolicyProcessorPipeline.from_pretrained(
        folder, config_filename="policy_preprocessor.json", overrides=overrides
    )
    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )

    def predict(observation: dict, noise: Tensor) -> tuple[Tensor, Tensor]:
        images = {f"observation.images.{name}": image.float() / 255 for name, image in observation["image"].items()}
        batch = before({**images, "observation.state": observation["state"], "task": observation["task"]})
        tokens = batch["observation.language.tokens"][batch["observation.language.attention_mask"]]
        return tokens, after(policy.predict_action_chunk(batch, noise=noise[None])[0])

    return predict


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A checkpoint as LeRobot's training writes it: policy and both processors. Its lm_head has drifted."""
    folder = tmp_path_factory.mktemp("lerobot")
    size = CONFIG.vision.image_size
    config = PI05Config(
        device="cpu",
        chunk_size=CONFIG.horizon,
        n_action_steps=CONFIG.horizon,
        max_action_dim=CONFIG.action_dim,
        image_resolution=(size, size),
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 60, 80)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, size, size)),
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    )
    with lerobot_sizes(CONFIG):
        policy = PI05Policy(config)
    randomize(policy)
    policy.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    stats = {
        key: {"q01": -torch.rand(dims, generator=generator), "q99": 1 + torch.rand(dims, generator=generator)}
        for key, dims in (("observation.state", STATE_DIM), ("action", ACTION_DIM))
    }
    steps = make_default_policy_processor_steps(config, stats)
    tokenize = TokenizerProcessorStep(tokenizer_name=str(tokenizer), max_length=64, padding="max_length")
    state = Pi05PrepareStateTokenizerProcessorStep()
    for pipeline in make_policy_processor_pipelines(
        [steps.rename_observations, steps.add_batch_dim, steps.normalize, state, tokenize, steps.to_device],
        [steps.unnormalize, steps.to_cpu],
    ):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "policy"
    convert(source=source, target=folder)
    return folder


@pytest.fixture(scope="module")
def exported(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "policy"
    export(ours, folder)
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Copy:
    """A copy of the source whose tensors were changed."""

    def changed(change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(source, folder)
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return changed
