"""LeRobot's π0.5 in sizes of our choice, its weights in ours, and one set of inputs in the form that each takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch
from torch import Tensor, nn
from transformers import PretrainedConfig

from benchmarks.sizes import Work
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Target
from pi05_lightning.weights.lerobot import to_ours


def lerobot_config(config: ModelConfig, **changes: Any) -> PI05Config:
    size = config.vision.image_size
    return PI05Config(
        device="cpu",
        chunk_size=config.horizon,
        n_action_steps=config.horizon,
        max_action_dim=config.action_dim,
        image_resolution=(size, size),
        **changes,
    )


def build_lerobot(config: ModelConfig, **changes: Any) -> PI05Pytorch:
    """LeRobot's model with these dimensions; its own initialisation, of which zeros are drawn anew."""
    with lerobot_sizes(config):
        model = PI05Pytorch(lerobot_config(config, **changes))
    if next(model.parameters()).device.type != "meta":
        randomize(model)
    return model


@contextmanager
def lerobot_sizes(config: ModelConfig) -> Iterator[None]:
    """Within it LeRobot, whose sizes are constants in its code, builds π0.5 with our dimensions."""
    gemmas = {"gemma_2b": config.language, "gemma_300m": config.expert}
    with (
        patch.object(modeling_pi05, "get_gemma_config", gemmas.__getitem__),
        resized(modeling_pi05, "PaliGemmaForConditionalGenerationWithPiGemma", config),
        resized(modeling_pi05, "PiGemmaForCausalLM", config),
    ):
        yield


def resized(module: ModuleType, name: str, sizes: ModelConfig) -> AbstractContextManager[object]:
    """Within it, a transformers class in a LeRobot module is built with our vision dims and vocabulary."""
    original = getattr(module, name)

    def build(config: PretrainedConfig) -> nn.Module:
        text = getattr(config, "text_config", config)
        text.vocab_size = sizes.vocab_size
        if text is not config:
            config.image_token_index = sizes.vocab_size
            vision = config.vision_config
            vision.hidden_size, vision.num_hidden_layers = sizes.vision.width, sizes.vision.depth
            vision.num_attention_heads, vision.intermediate_size = sizes.vision.num_heads, sizes.vision.mlp_dim
            vision.image_size, vision.patch_size = sizes.vision.image_size, sizes.vision.patch_size
            vision.projection_dim = sizes.language.width
        return original(config)

    return patch.object(module, name, build)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every weight; with adaRMS zero-initialised, half of the network would compare nothing."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "language_model.embed_tokens" in name:
            std = parameter.shape[1] ** -0.5  # of order one after the scale by √width
        elif parameter.ndim >= 2 and "embed" not in name:
            std = parameter[0].numel() ** -0.5
        else:
            std = 0.3
        parameter.normal_(0, std, generator=generator)


def with_weights_of(lerobot: PI05Pytorch, config: ModelConfig) -> Pi05:
    """Our model over the very memory of LeRobot's parameters."""
    model = Pi05.without_memory(config)
    tensors = {to_ours(name): p.detach() for name, p in lerobot.named_parameters() if to_ours(name)}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_()


@dataclass(frozen=True)
class Inputs:
    """The same observations and actions twice: as LeRobot's model takes them, and as ours does."""

    images: list[Tensor]
    image_masks: list[Tensor]
    tokens: Tensor
    token_mask: Tensor
    actions: Tensor
    noise: Tensor
    time: Tensor
    batch: Batch

    def lerobot_loss(self, model: PI05Pytorch) -> Tensor:
        """f32[B T D], squared error per element."""
        arguments = (self.images, self.image_masks, self.tokens, self.token_mask, self.actions, self.noise, self.time)
        return model(*arguments)

    def lerobot_chunk(self, model: PI05Pytorch) -> Tensor:
        """f32[B T D]."""
        arguments = (self.images, self.image_masks, self.tokens, self.token_mask)
        return model.sample_actions(*arguments, noise=self.noise, num_steps=10)

    def our_loss(self, model: Pi05, insulate: bool = False) -> Tensor:
        flow = model(self.batch, ["flow"], insulate=insulate)["flow"].values
        assert flow is not None
        return flow[:, 0]

    @torch.no_grad()
    def our_chunk(self, model: Pi05) -> Tensor:
        assert self.batch.noise is not None
        return model.flow_head.sample(model.backbone(self.batch, need_hidden=False), self.batch.noise, 10)[:, 0]


def make_inputs(config: ModelConfig, work: Work, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random images, prompts and actions. LeRobot takes every camera's image and padded prompts, ours what is there."""
    generator = torch.Generator().manual_seed(seed)
    size, rows, cameras = config.vision.image_size, work.batch, len(work.present)
    used = [camera for camera, there in enumerate(work.present) if there]
    pixels = torch.randint(0, 256, (rows, cameras, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(2, config.vocab_size, (rows, work.padded), generator=generator)
    token_mask = (torch.arange(work.padded) < work.tokens).expand(rows, -1)
    tokens = tokens * token_mask
    actions, noise = torch.randn(2, rows, config.horizon, config.action_dim, generator=generator)
    time = 0.001 + 0.999 * torch.rand(rows, generator=generator)
    nothing = torch.zeros(0, dtype=torch.long)  # `index_targets` would look for targets, which fake tensors cannot say
    batch = Batch(
        pixels=pixels[:, used].flatten(0, 1),
        image_index=torch.arange(rows * len(used)),
        camera=torch.tensor(used * rows),
        image_mask=torch.ones(rows, len(used), dtype=torch.bool),
        tokens=tokens[:, : work.tokens],
        token_mask=token_mask[:, : work.tokens],
        causal=torch.zeros(rows, work.tokens, dtype=torch.bool),
        target_kind=torch.full((rows, work.tokens), Target.NONE, dtype=torch.uint8),
        target_index={target: nothing for target in Target if target is not Target.NONE},
        actions=actions,
        action_mask=torch.ones_like(actions, dtype=torch.bool),
        key=torch.arange(rows),
        noise=noise[:, None],
        time=time[:, None],
    )
    return Inputs(
        images=[image.to(device) for image in (pixels.float() / 127.5 - 1).unbind(1)],
        image_masks=[torch.full((rows,), there, device=device) for there in work.present],
        tokens=tokens.to(device),
        token_mask=token_mask.to(device),
        actions=actions.to(device),
        noise=noise.to(device),
        time=time.to(device),
        batch=batch.to(device),
    )
