"""The vision-language backbone: images and tokens to hidden states and to the keys and values that the flow head reads.

Sequence and who sees whom (rows attend to columns; i images, p prompt, t predicted text or subtask, f FAST):

          i i p p t t f f
    i i   1 1 1 1 . . . .      images and prompt: one block, both ways
    p p   1 1 1 1 . . . .
    t     1 1 1 1 1 . . .      predicted tokens: causal
    t     1 1 1 1 1 1 . .
    f     1 1 1 1 1 1 1 .
    flow  1 1 1 1 s s . .      the flow head: given tokens and the subtask (s), never answers, never FAST
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.gemma import KV, AdaRMSNorm, Block, RMSNorm, rope_table, with_room
from pi05_lightning.models.kernels import Embedding, linear
from pi05_lightning.models.keypoints import KeypointStem, fourier_features
from pi05_lightning.models.quantized import set_weight
from pi05_lightning.models.shards import own_part, unsharded
from pi05_lightning.models.siglip import Siglip
from pi05_lightning.types import Batch, Prefix, Target


@dataclass
class Cache:
    """Preallocated keys and values of a sequence that is still growing by the same number of columns in every row.

    kv: per layer [B H_kv S_max head_dim];  mask, flow_mask: bool[B S_max];  length: columns written;
    count: i64[B] valid tokens so far, which is the next token's position.
    """

    kv: list[KV]
    mask: Tensor
    flow_mask: Tensor
    length: int
    count: Tensor

    @classmethod
    def extend(cls, prefix: Prefix, columns: int) -> Cache:
        """Room for `columns` more tokens after a prefix."""
        batch, length = prefix.mask.shape
        room = prefix.mask.new_zeros(batch, columns)
        return cls(
            kv=[(with_room(k, columns), with_room(v, columns)) for k, v in prefix.kv],
            mask=torch.cat([prefix.mask, room], 1),
            flow_mask=torch.cat([prefix.flow_mask, room], 1),
            length=length,
            count=prefix.mask.sum(1),
        )

    def prefix(self) -> Prefix:
        """What was written, as the flow head reads it (views)."""
        n = self.length
        kv = [(k[:, :, :n], v[:, :, :n]) for k, v in self.kv]
        return Prefix(None, kv, self.mask[:, :n], self.flow_mask[:, :n])


class Backbone(nn.Module):
    """SigLIP (or the keypoint stem) and Gemma; its embedding matrix is also the language-model head's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.language.width
        stems: dict[str, type[Siglip | KeypointStem]] = {"siglip_gemma": Siglip, "keypoint_gemma": KeypointStem}
        self.head_dim = config.language.head_dim
        self.vision = stems[config.backbone_type](config.vision, width)
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.unembedding: nn.Module | None = None
        """What makes the logits of a policy that computes in 8 bits; otherwise the embedding does."""
        blocks = (Block(config.language) for _ in range(config.language.depth))
        self.layers: list[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = RMSNorm(width)

    def forward(self, batch: Batch, *, need_hidden: bool = True, need_vision: bool = False) -> Prefix:
        """Run a whole sequence.

        Of the last layer, the flow head reads keys and values, of all columns; what else it computes is for predicting
        tokens, and done for these alone, or without `need_hidden` for none.  need_vision: the vision tower runs even if
        there is no image, on none.
        """
        x, mask, causal, vision = self.embed(batch, need_vision)
        flow_mask = mask.clone()
        hidden = (batch.target_kind == Target.TEXT) | (batch.target_kind == Target.FAST)
        flow_mask[:, -batch.tokens.shape[1] :] &= ~hidden
        rope = rope_table((mask.cumsum(1) - 1).clamp(min=0), self.head_dim)
        # what nobody predicts is one block: every query sees the same
        seen = prefix_mask(mask, causal) if batch.has_token_targets else mask[:, None, None]
        columns, tokens = x.shape[1], batch.tokens.shape[1]

        kv: list[KV] = []
        for layer in self.layers[:-1]:
            x, layer_kv = layer(x, rope, seen)
            kv.append(layer_kv)
        last = self.layers[-1]
        if not need_hidden:
            return Prefix(None, [*kv, last.keys_values(x, rope)], mask, flow_mask, vision)
        x, layer_kv = last(x, rope, seen[:, :, -tokens:], columns - tokens)
        return Prefix(self.norm(x), [*kv, layer_kv], mask, flow_mask, vision)

    def embed(self, batch: Batch, need_vision: bool = False) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """-> embeddings [B S W], valid bool[B S], causal bool[B S], images first, then tokens; `Prefix.vision`."""
        rows, cameras = batch.image_mask.shape
        text = self.embed_text(batch.tokens)
        if not cameras and not need_vision:
            return text, batch.token_mask, batch.causal, {}
        # all present images of all cameras in one call
        dtype = next(self.vision.parameters()).dtype  # LeRobot's bf16 checkpoints keep it in fp32
        pixels = (batch.pixels.float() / 127.5 - 1).to(dtype)  # rounded once
        if isinstance(self.vision, KeypointStem) and self.vision.pointed is not None:
            asked = (batch.token_mask & ~batch.causal)[..., None]
            prompt = (text * asked).sum(1) / asked.sum(1).clamp(min=1)
            row = batch.image_index // max(cameras, 1)
            features, vision = self.vision(pixels, batch.camera, prompt[row])
        else:
            features, vision = self.vision(pixels, batch.camera)
        if not cameras:
            return text + nothing_of(features), batch.token_mask, batch.causal, vision
        slots = features.new_zeros(rows * cameras, *features.shape[1:])
        slots = slots.index_copy(0, batch.image_index, features)
        images = rearrange(slots, "(b c) n w -> b (c n) w", b=rows)
        image_mask = batch.image_mask.repeat_interleave(features.shape[1], dim=1)
        return (
            torch.cat([images.to(text.dtype), text], dim=1),
            torch.cat([image_mask, batch.token_mask], dim=1),
            torch.cat([torch.zeros_like(image_mask), batch.causal], dim=1),
            vision,
        )

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Tokens i64[B L] as [B L W], scaled by √W as Gemma does."""
        return self.embed_tokens(tokens) * self.embed_tokens.embedding_dim**0.5

    def logits(self, hidden: Tensor) -> Tensor:
        """Of what a policy says next, f32[... V], from hidden states [... W]."""
        made = linear(hidden, self.embed_tokens.weight) if self.unembedding is None else self.unembedding(hidden)
        return made.float()

    def decode(self, tokens: Tensor, valid: Tensor, cache: Cache, *, flow_visible: bool) -> Tensor:
        """Append tokens i64[B n] (valid bool[B n]) to the cache, causally, and return their hidden states [B n W]."""
        start, n = cache.length, tokens.shape[1]
        stop = start + n
        cache.mask[:, start:stop] = valid
        cache.flow_mask[:, start:stop] = valid & flow_visible
        positions = cache.count[:, None] + valid.cumsum(1) - 1
        cache.count += valid.sum(1)
        cache.length = stop
        column = torch.arange(stop, device=tokens.device)
        attend = cache.mask[:, None, None, :stop] & (column <= column[start:, None])
        rope = rope_table(positions.clamp(min=0), self.head_dim)

        x = self.embed_text(tokens)
        for layer, (keys, values) in zip(self.layers, cache.kv, strict=True):
            y = layer.input_layernorm(x)
            keys[:, :, start:stop], values[:, :, start:stop] = layer.self_attn.keys_values(y, rope)
            x = layer.mix(x, y, rope, attend, (keys[:, :, :stop], values[:, :, :stop]))
        return self.norm(x)

    def reset_parameters(self, ordinal_ids: list[list[int]] | None = None) -> None:
        """Initialise from scratch (fan-in scaled).

        ordinal_ids: groups of token ids that stand for ordered numbers (coordinates, state bins). Each group starts on
        a Fourier curve, so that neighbours are alike and a small model need not learn a thousand unrelated words.
        """
        initialize(self)
        if isinstance(self.vision, KeypointStem):
            with unsharded(self.vision, gather=True):
                self.vision.reset_parameters()
        if ordinal_ids:
            with unsharded(self.embed_tokens, gather=True):
                for ids in ordinal_ids:
                    place_on_curve(self.embed_tokens.weight, ids)


def nothing_of(*tensors: Tensor) -> Tensor:
    """0, whose gradient reaches the tensors, as zeros."""
    return torch.stack([tensor.flatten()[:0].sum() for tensor in tensors]).sum()


def prefix_mask(valid: Tensor, causal: Tensor) -> Tensor:
    """Who attends to whom, bool[B 1 S S]: every causal token opens a block, blocks see themselves and earlier ones."""
    block = causal.cumsum(1)
    return ((block[:, :, None] >= block[:, None, :]) & valid[:, None, :])[:, None]


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Every weight below `module`, whatever its memory held: variance 1 / fan-in, norms 1, biases and adaRMS 0.

    Adapters are left out. Of what is divided between ranks, one layer is whole at a time.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding | nn.LayerNorm | RMSNorm) and ".lora_" not in name:
            with unsharded(layer):
                _initialize_layer(layer)
    for norm in module.modules():
        if isinstance(norm, AdaRMSNorm):
            set_weight(norm.dense, lambda weight: nn.init.zeros_(own_part(weight)))
            nn.init.zeros_(own_part(norm.dense.bias))


def _initialize_layer(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear | nn.Conv2d):
        set_weight(layer, partial(nn.init.normal_, std=layer.weight.shape[1:].numel() ** -0.5))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Embedding):
        nn.init.normal_(layer.weight, std=layer.embedding_dim**-0.5)
    elif isinstance(layer, nn.LayerNorm):
        layer.reset_parameters()
    elif isinstance(layer, RMSNorm):
        nn.init.zeros_(layer.weight)


@torch.no_grad()
def place_on_curve(embedding: Tensor, ids: list[int]) -> None:
    """Give the rows `ids` of an embedding [V W] random values in which neighbours are alike, as numbers are."""
    width = embedding.shape[1]
    octaves = 6
    features = fourier_features(torch.linspace(0, 1, len(ids), device=embedding.device), octaves)
    basis = torch.randn(2 * octaves, width, device=embedding.device) / octaves**0.5
    embedding[torch.tensor(ids, device=embedding.device)] = ((features @ basis) * width**-0.5).to(embedding.dtype)
