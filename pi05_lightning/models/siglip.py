"""SigLIP's vision tower and PaliGemma's projector: images to language-model tokens."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pi05_lightning.models.config import VisionConfig
from pi05_lightning.models.gemma import compute_dtype
from pi05_lightning.models.kernels import Embedding, Linear, attend, linear_gelu


class LayerNorm(nn.LayerNorm):
    """Computed in fp32 whatever the input and the weights are; the CPU's own kernel for bf16 rounds on the way."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(compute_dtype(x))


class SiglipAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width) for _ in range(3))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "p n (h d) -> p h n d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(attend(q, k, v), "p h n d -> p n (h d)"))


class SiglipBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, eps=1e-6)
        self.self_attn = SiglipAttention(config.width, config.num_heads)
        self.layer_norm2 = LayerNorm(config.width, eps=1e-6)
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.fc2(linear_gelu(self.fc1, self.layer_norm2(x)))


class Siglip(nn.Module):
    """SigLIP and the linear projector; (image_size / patch_size)² tokens per image, learned positions."""

    def __init__(self, config: VisionConfig, out_width: int) -> None:
        super().__init__()
        self.num_tokens, self.width = (config.image_size // config.patch_size) ** 2, config.width
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = Embedding(self.num_tokens, config.width)
        self.layers = nn.ModuleList(SiglipBlock(config) for _ in range(config.depth))
        self.post_layernorm = LayerNorm(config.width, eps=1e-6)
        self.projector = Linear(config.width, out_width)

    def forward(self, images: Tensor, camera: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """images f32[P 3 H W] in [-1, 1] -> tokens [P N W], nothing for heads. SigLIP treats all cameras alike."""
        x = rearrange(self.patch_embedding(images), "p w h v -> p (h v) w") + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.projector(self.post_layernorm(x)), {}
