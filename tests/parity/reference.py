"""LeRobot's own pi0_fast at small dimensions, and one set of inputs in LeRobot's form and in ours."""

from __future__ import annotations

import inspect
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi05 import modeling_pi05
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.peer import randomize, resized
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Target, index_targets
from pi05_lightning.weights.locate import locate


def any_number_of_heads() -> AbstractContextManager[object]:
    """Within it, LeRobot's training pass runs with other than the eight heads that are a number in its source."""
    source = inspect.getsource(modeling_pi05.compute_layer_complete)
    assert source.count("1 * 8 * head_dim") == 1
    scope = dict(vars(modeling_pi05))
    exec(source.replace("1 * 8 * head_dim", "att_output.shape[-2] * head_dim"), scope)
    return patch.object(modeling_pi05, "compute_layer_complete", scope["compute_layer_complete"])


def build_lerobot_fast(config: ModelConfig, tokenizer: object = None) -> modeling_pi0_fast.PI0FastPytorch:
    """LeRobot's pi0_fast with the dimensions of a config."""
    with (
        patch.object(modeling_pi0_fast, "get_gemma_config", {"gemma_2b": config.language}.__getitem__),
        resized(modeling_pi0_fast, "PaliGemmaForConditionalGenerationWithPiGemma", config),
    ):
        model = modeling_pi0_fast.PI0FastPytorch(PI0FastConfig(device="cpu"), paligemma_tokenizer=tokenizer)
    randomize(model)
    return model.eval()


@dataclass
class Inputs:
    """The same observations twice: as LeRobot's model takes them and as ours does."""

    images: list[Tensor]
    image_masks: list[Tensor]
    tokens: Tensor
    token_mask: Tensor
    actions: Tensor
    noise: Tensor
    time: Tensor
    batch: Batch


def make_inputs(
    config: ModelConfig, present: list[list[bool]], lengths: list[int], *, padded_length: int, seed: int = 0
) -> Inputs:
    """Random inputs: present[b][c] says which cameras row b has, lengths[b] how many prompt tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows, cameras, size = len(lengths), len(present[0]), config.vision.image_size
    pixels = torch.randint(0, 256, (rows, cameras, 3, size, size), dtype=torch.uint8, generator=generator)
    mask = torch.tensor(present, dtype=torch.bool)
    tokens = torch.randint(2, config.vocab_size, (rows, padded_length), generator=generator)
    token_mask = torch.arange(padded_length) < torch.tensor(lengths)[:, None]
    tokens[~token_mask] = 0
    actions = torch.randn(rows, config.horizon, config.action_dim, generator=generator)
    noise = torch.randn(rows, config.horizon, config.action_dim, generator=generator)
    time = 0.001 + 0.999 * torch.rand(rows, generator=generator)

    longest = max(lengths)
    batch = Batch(
        **pack_images(pixels, mask),
        tokens=tokens[:, :longest],
        token_mask=token_mask[:, :longest],
        causal=torch.zeros(rows, longest, dtype=torch.bool),
        target_kind=torch.full((rows, longest), Target.NONE, dtype=torch.uint8),
        target_index=index_targets(torch.zeros(0, dtype=torch.uint8)),
        actions=actions,
        action_mask=torch.ones_like(actions, dtype=torch.bool),
        key=torch.arange(rows),
        noise=noise[:, None],
        time=time[:, None],
    )
    return Inputs(
        images=list((pixels.float() / 127.5 - 1).unbind(1)),
        image_masks=list(mask.unbind(1)),
        tokens=tokens,
        token_mask=token_mask,
        actions=actions,
        noise=noise,
        time=time,
        batch=batch,
    )


def pack_images(pixels: Tensor, present: Tensor) -> dict[str, Tensor]:
    """u8[B C 3 H W] and present bool[B C] to the image fields of a `Batch`: absent cameras are left out."""
    rows, camera = present.nonzero(as_tuple=True)
    place = (present.cumsum(1) - 1)[rows, camera]
    slots = int(present.sum(1).max())
    return {
        "pixels": pixels[rows, camera],
        "image_index": rows * slots + place,
        "camera": camera,
        "image_mask": torch.arange(slots) < present.sum(1, keepdim=True),
    }


def save_lerobot(model: nn.Module, config: ModelConfig, folder: Path, prefix: str = "model.") -> Path:
    """A checkpoint folder as LeRobot writes it."""
    save_file({prefix + key: tensor for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    size = config.vision.image_size
    values = {
        "type": "pi05",
        "chunk_size": config.horizon,
        "max_action_dim": config.action_dim,
        "image_resolution": [size, size],
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def convert(model: nn.Module, config: ModelConfig, folder: Path) -> Pi05:
    """Our model with LeRobot's weights, by way of the disk."""
    ours = locate(save_lerobot(model, config, folder)).model()
    assert ours.config == config
    return ours


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference value."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()
