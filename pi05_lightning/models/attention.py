"""Scaled dot-product attention, with the kernel that is fastest where the tensors are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
"""bool[B 1 S S_k], or bool[B 1 1 S_k] where it is the same for every query; or the same as `block_mask` makes it."""


def block_mask(mask: Tensor, queries: int) -> BlockMask:
    """A mask for FlexAttention, whose kernels for GPUs leave out the tiles of it in which nobody sees anybody."""
    rows, _, _, keys = mask.shape
    seen = mask.expand(-1, -1, queries, -1)
    return create_block_mask(lambda b, h, i, j: seen[b, 0, i, j], rows, None, queries, keys, device=str(mask.device))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v -> [B H S d].

    q [B H S d]; k, v [B H_kv S_k d], each read by H / H_kv query heads; without a mask all see all.
    """
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)  # statistics come with it only when they are asked for
        return out
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attend_in_two_products(q, k, v, mask)
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == heads:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if mask is None or mask.shape[2] == 1:  # query heads that share a key are more queries of one head
        folded = rearrange(q, "b (h g) s d -> b h (g s) d", h=kv_heads)
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
        return rearrange(out, "b h (g s) d -> b (h g) s d", s=q.shape[2])
    if kv_heads == 1:  # a view: nothing is copied
        k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    else:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_in_two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # PyTorch's fused kernel for the CPU does not use the processor's bf16 instructions in its backward pass, plain
    # products do; query heads that share a key are rows of one product
    kv_heads, queries = k.shape[1], q.shape[2]
    q = rearrange(q * q.shape[-1] ** -0.5, "b (h g) s d -> b h (g s) d", h=kv_heads)
    scores = q @ k.transpose(-1, -2)
    if mask is not None:  # the weight of what is hidden is 0, and so is its gradient: nothing to go back through
        of_heads = rearrange(scores.detach(), "b h (g s) t -> b (h g) s t", s=queries)
        of_heads.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return rearrange(scores.softmax(-1) @ v, "b h (g s) d -> b (h g) s d", h=kv_heads, s=queries)
