"""Parameters of π0.5 as openpi's JAX code has them, of odd dimensions: names and shapes from its model's definition."""

from __future__ import annotations

from typing import Any

import numpy as np

LAYERS, HEADS, HEAD_DIM, WIDTH, MLP, VOCAB = 2, 2, 6, 10, 14, 4096
EXPERT_WIDTH, EXPERT_MLP, ACTIONS = 8, 6, 5
VISION_LAYERS, VISION_HEADS, VISION_WIDTH, VISION_MLP, PATCH, POSITIONS = 3, 3, 12, 9, 7, 4
RANK = 3


def tree(seed: int = 0, lora: bool = False) -> dict[str, Any]:
    """Random values; as nested dictionaries, without the `value` that training puts below each."""
    draw = np.random.default_rng(seed)

    def p(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    def linear(inputs: int, outputs: int, *stacked: int) -> dict[str, np.ndarray]:
        return {"kernel": p(*stacked, inputs, outputs), "bias": p(*stacked, outputs)}

    def norm(width: int, *stacked: int) -> dict[str, np.ndarray]:
        return {"scale": p(*stacked, width), "bias": p(*stacked, width)}

    def einsum(*shape: int) -> dict[str, np.ndarray]:
        *rest, inner, outer = shape
        pair = {"lora_a": p(*rest, inner, RANK), "lora_b": p(*rest, RANK, outer)} if lora else {}
        return {"w": p(*shape), **pair}

    def mlp(width: int, hidden: int) -> dict[str, np.ndarray]:
        found = {"gating_einsum": p(LAYERS, 2, width, hidden), "linear": p(LAYERS, hidden, width)}
        if lora:
            found |= {"gating_einsum_lora_a": p(LAYERS, 2, width, RANK), "linear_lora_a": p(LAYERS, hidden, RANK)}
            found |= {"gating_einsum_lora_b": p(LAYERS, 2, RANK, hidden), "linear_lora_b": p(LAYERS, RANK, width)}
        return found

    v, w = VISION_LAYERS, VISION_WIDTH
    each = (v, w, VISION_HEADS, w // VISION_HEADS)
    attention: dict[str, Any] = {
        name: {"kernel": p(*each), "bias": p(v, *each[2:])} for name in ("query", "key", "value")
    }
    attention["out"] = {"kernel": p(v, *each[2:], w), "bias": p(v, w)}
    image = {
        "embedding": {"kernel": p(PATCH, PATCH, 3, w), "bias": p(w)},
        "pos_embedding": p(1, POSITIONS, w),
        "Transformer": {
            "encoderblock": {
                "LayerNorm_0": norm(w, v),
                "LayerNorm_1": norm(w, v),
                "MlpBlock_0": {"Dense_0": linear(w, VISION_MLP, v), "Dense_1": linear(VISION_MLP, w, v)},
                "MultiHeadDotProductAttention_0": attention,
            },
            "encoder_norm": norm(w),
        },
        "head": linear(w, WIDTH),
    }
    attention = {}
    for end, width in (("", WIDTH), ("_1", EXPERT_WIDTH)):
        attention[f"q_einsum{end}"] = einsum(LAYERS, HEADS, width, HEAD_DIM)
        attention[f"kv_einsum{end}"] = einsum(LAYERS, 2, 1, width, HEAD_DIM)
        attention[f"attn_vec_einsum{end}"] = einsum(LAYERS, HEADS, HEAD_DIM, width)
    e = EXPERT_WIDTH
    language = {
        "embedder": {"input_embedding": p(VOCAB, WIDTH)},
        "layers": {
            "attn": attention,
            "mlp": mlp(WIDTH, MLP),
            "mlp_1": mlp(e, EXPERT_MLP),
            "pre_attention_norm": {"scale": p(LAYERS, WIDTH)},
            "pre_ffw_norm": {"scale": p(LAYERS, WIDTH)},
            "pre_attention_norm_1": {"Dense_0": linear(e, 3 * e, LAYERS)},
            "pre_ffw_norm_1": {"Dense_0": linear(e, 3 * e, LAYERS)},
        },
        "final_norm": {"scale": p(WIDTH)},
        "final_norm_1": {"Dense_0": linear(e, 3 * e)},
    }
    return {
        "PaliGemma": {"img": image, "llm": language},
        "action_in_proj": linear(ACTIONS, e),
        "action_out_proj": linear(e, ACTIONS),
        "time_mlp_in": linear(e, e),
        "time_mlp_out": linear(e, e),
    }


def with_values(part: Any) -> Any:
    """As training saves them: `value` below each."""
    return {name: with_values(of) for name, of in part.items()} if isinstance(part, dict) else {"value": part}
