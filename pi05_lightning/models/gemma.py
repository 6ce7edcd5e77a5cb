"""Gemma, as π0.5 uses it twice: the language model, and the action expert with adaptive norms (adaRMS).

The language model runs alone and keeps each layer's keys and values; the expert runs after it and attends to them and
to itself. That split is exact, since the backbone never attends to the expert.

Shapes: x [B S W]; keys, values [B H_kv S head_dim]; masks bool[B 1 S_q S_k]; rotary tables cos, sin [B 1 S head_dim].
Numerics (RMSNorm in fp32 with 1 + weight, GeGLU with tanh-gelu, RoPE base 10 000, half-split rotation) follow Gemma.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from pi05_lightning.models.config import GemmaConfig
from pi05_lightning.models.kernels import Linear, attend, geglu

KV = tuple[Tensor, Tensor]
Rope = tuple[Tensor, Tensor]
ROPE_BASE = 10_000.0
RMS_EPSILON = 1e-6


def rope_table(positions: Tensor, head_dim: int) -> Rope:
    """cos and sin for integer positions i64[B S], f32[B 1 S head_dim] each; built once per batch, not per layer."""
    frequency = ROPE_BASE ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of x [B H S head_dim]."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the linear layers that read x compute in: cast once here, and not by autocast in each of them."""
    device = x.device.type
    # meta has no autocast; to ask torch which devices have one would break the compiler's graph
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def rms_normalize(x: Tensor) -> Tensor:
    """x [... W] over the root mean square of its last axis, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPSILON)


def with_room(x: Tensor, columns: int, dtype: torch.dtype | None = None, copies: int = 1) -> Tensor:
    """Copies of keys or values [B H_kv S head_dim] with zeros for `columns` more tokens, [B·copies H_kv S+columns ...].

    A row's copies follow each other.
    """
    rows, heads, length, head_dim = x.shape
    out = x.new_zeros(rows, copies, heads, length + columns, head_dim, dtype=dtype)
    out[..., :length, :] = x[:, None]
    return out.flatten(0, 1)


def append(past: Tensor, own: Tensor, copies: int) -> Tensor:
    """Keys or values [B H_kv S head_dim], each row `copies` times, and behind them [B·copies H_kv n head_dim]."""
    past = past.to(own.dtype)[:, None].expand(-1, copies, -1, -1, -1)
    return torch.cat([past, own.unflatten(0, (-1, copies))], dim=3).flatten(0, 1)


class RMSNorm(nn.Module):
    """Gemma's norm: y = x / rms(x) · (1 + weight), computed in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (rms_normalize(x) * (1 + self.weight.float())).to(compute_dtype(x))


class AdaRMSNorm(nn.Module):
    """The expert's norm (π0.5 §IV): scale, shift and gate are a function of the flow time; zero-initialised.

    `modulate` is apart from `forward`, so that at inference it is a table over the fixed time grid.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def modulate(self, cond: Tensor) -> Tensor:
        """cond [... t W] (t is 1 or T) -> modulation [... t 3W]."""
        return self.dense(cond)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x [R·K T W], modulation [R·K t 3W] -> normalised x and the gate of the residual that follows."""
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normed = rms_normalize(x) * (1 + scale.float()) + shift.float()
        return normed.to(compute_dtype(x)), gate.to(x.dtype)


class Attention(nn.Module):
    """Multi-query attention over its own tokens and, for the expert and for decoding, over past keys and values."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def keys_values(self, x: Tensor, rope: Rope) -> KV:
        """Of normed tokens x [B S W]: K (rotated) and V, [B H_kv S head_dim] each."""
        k = rearrange(self.k_proj(x), "b s (h d) -> b h s d", h=self.num_kv_heads)
        v = rearrange(self.v_proj(x), "b s (h d) -> b h s d", h=self.num_kv_heads)
        return rotate(k, rope), v

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, kv: KV) -> Tensor:
        """What normed tokens x [B Q W] take from keys and values of S tokens, [B Q W]; mask: see `attend`."""
        q = rotate(rearrange(self.q_proj(x), "b s (h d) -> b h s d", h=self.num_heads), rope)
        out = attend(q, kv[0].to(q.dtype), kv[1].to(q.dtype), mask)
        return self.o_proj(rearrange(out, "b h s d -> b s (h d)"))


class MLP(nn.Module):
    """GeGLU with the tanh approximation of gelu."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, mlp_dim, bias=False)
        self.up_proj = Linear(width, mlp_dim, bias=False)
        self.down_proj = Linear(mlp_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj, self.up_proj, x))


class Block(nn.Module):
    """A language-model layer: norm, attention, norm, MLP, both with a residual."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_dim)

    def keys_values(self, x: Tensor, rope: Rope) -> KV:
        """What the layer lets others attend to, [B H_kv S head_dim] each; all that is needed of the last layer."""
        return self.self_attn.keys_values(self.input_layernorm(x), rope)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, first: int = 0) -> tuple[Tensor, KV]:
        """Output of the columns from `first` on, for which the mask is, and keys and values of all."""
        y = self.input_layernorm(x)
        kv = self.self_attn.keys_values(y, rope)
        cos, sin = rope
        return self.mix(x[:, first:], y[:, first:], (cos[:, :, first:], sin[:, :, first:]), mask, kv), kv

    def mix(self, x: Tensor, normed: Tensor, rope: Rope, mask: Tensor, kv: KV) -> Tensor:
        """The layer's output for tokens x (normed: after the first norm) that attend to kv."""
        x = x + self.self_attn(normed, rope, mask, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Context:
    """What the actions attend to, the same at every flow time. A draw is a row of its own: it sees no other draw.

    kv: per layer what the prefix has, [R H_kv S head_dim]; if has_room, a copy for each of K draws,
    [R·K H_kv S+T head_dim], with room for the actions' own;  mask: which of the S + T are seen, the same for every
    action of a row;  rope: of the actions' positions.
    """

    kv: list[KV]
    draws: int
    has_room: bool
    mask: Tensor
    rope: Rope


class ExpertBlock(nn.Module):
    """An action-expert layer: adaptive norms with gated residuals; attends to the prefix's keys and to its own."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = AdaRMSNorm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = AdaRMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_dim)

    def forward(self, x: Tensor, past: KV, modulation: tuple[Tensor, Tensor], context: Context) -> Tensor:
        """x [R·K T W]: T actions a row;  past: this layer's of `context.kv`;  modulation: one per norm, [R·K t 3W]."""
        # LeRobot's bf16 checkpoints keep the projections before it in fp32
        x = x.to(self.self_attn.q_proj.weight.dtype)
        y, gate = self.input_layernorm(x, modulation[0])
        own = self.self_attn.keys_values(y, context.rope)
        if context.has_room:
            for room, x_own in zip(past, own, strict=True):
                room[:, :, -x_own.shape[2] :] = x_own
            kv = past
        else:
            k, v = (append(p, o, context.draws) for p, o in zip(past, own, strict=True))
            kv = k, v
        y = self.self_attn(y, context.rope, context.mask, kv)
        x = x + gate * y
        y, gate = self.post_attention_layernorm(x, modulation[1])
        return x + gate * self.mlp(y)
