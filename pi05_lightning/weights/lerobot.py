"""Names and dimensions of LeRobot's and openpi's π0.5: theirs as ours, and back.

Both keep the same names (openpi without the `model.` prefix). Two of their tensors no loss of π0.5 reads: the language
model's head, which π0.5 ties to the embedding, and the expert's. They are handed back apart, for the way back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.config import GemmaConfig, ModelConfig, VisionConfig

_PALIGEMMA = "paligemma_with_expert.paligemma"
_VISION = f"{_PALIGEMMA}.model.vision_tower.vision_model"
_EXPERT = "paligemma_with_expert.gemma_expert"

NAMES = (
    (f"{_VISION}.embeddings.patch_embedding.*", "backbone.vision.patch_embedding.*"),
    (f"{_VISION}.embeddings.position_embedding.*", "backbone.vision.position_embedding.*"),
    (f"{_VISION}.encoder.layers.#.mlp.fc1.*", "backbone.vision.layers.#.fc1.*"),
    (f"{_VISION}.encoder.layers.#.mlp.fc2.*", "backbone.vision.layers.#.fc2.*"),
    (f"{_VISION}.encoder.layers.#.*", "backbone.vision.layers.#.*"),
    (f"{_VISION}.post_layernorm.*", "backbone.vision.post_layernorm.*"),
    (f"{_PALIGEMMA}.model.multi_modal_projector.linear.*", "backbone.vision.projector.*"),
    (f"{_PALIGEMMA}.model.language_model.embed_tokens.*", "backbone.embed_tokens.*"),
    (f"{_PALIGEMMA}.model.language_model.layers.#.*", "backbone.layers.#.*"),
    (f"{_PALIGEMMA}.model.language_model.norm.*", "backbone.norm.*"),
    (f"{_EXPERT}.model.layers.#.*", "flow_head.layers.#.*"),
    (f"{_EXPERT}.model.norm.*", "flow_head.norm.*"),
    ("action_in_proj.*", "flow_head.action_in_proj.*"),
    ("action_out_proj.*", "flow_head.action_out_proj.*"),
    ("time_mlp_in.*", "flow_head.time_mlp_in.*"),
    ("time_mlp_out.*", "flow_head.time_mlp_out.*"),
    # π0's names, found in early ports of π0.5; they are not written
    ("action_time_mlp_in.*", "flow_head.time_mlp_in.*"),
    ("action_time_mlp_out.*", "flow_head.time_mlp_out.*"),
)
"""LeRobot's key without its prefix, and ours; # is a layer's number, * the rest. The first match counts, either way."""

PREFIX = "model."
LM_HEAD = f"{_PALIGEMMA}.lm_head.weight"
EXPERT_LM_HEAD = f"{_EXPERT}.lm_head.weight"
EMBEDDING = "backbone.embed_tokens.weight"
EMBED_TOKENS = f"{_PALIGEMMA}.model.language_model.embed_tokens.weight"
UNREAD = (LM_HEAD, EXPERT_LM_HEAD)
"""Tensors that the network has no use for, but LeRobot's class has a place for."""
DROPPED = "state_proj."
"""π0's; LeRobot's class has no place for it and would load nothing at all."""

SIGLIP_HEAD_DIM = 72  # So400m: 1152 / 16
SIGLIP_HEADS = 16  # what LeRobot's code builds, whatever the width


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str | None:
    for source, target in names:
        pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)")
        if match := re.fullmatch(pattern, key):
            return re.sub(r"[#*]", "{}", target).format(*match.groups())
    return None


def to_ours(key: str) -> str | None:
    """Our name of a LeRobot or openpi key, None if π0.5 has no such tensor."""
    return _rename(key.removeprefix(PREFIX), NAMES)


def to_lerobot(key: str) -> str:
    """LeRobot's name of one of our keys."""
    renamed = _rename(key, ((ours, theirs) for theirs, ours in NAMES))
    if renamed is None:
        raise ValueError(f"{key} has no place in LeRobot's π0.5: only backbone_type siglip_gemma can be written so")
    return PREFIX + renamed


def lerobot_tensors(tensors: Mapping[str, Tensor], unread: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under LeRobot's names, whole: the heads that no loss reads are there too.

    unread: those of the checkpoint that the model came from; else the embedding stands for the language model's head
    (π0.5 ties them) and zeros for the expert's.
    """
    out = {to_lerobot(key): tensor for key, tensor in tensors.items()} | dict(unread)
    embedding, narrow = tensors[EMBEDDING], tensors["flow_head.action_in_proj.weight"]
    if PREFIX + LM_HEAD not in out:
        out[PREFIX + LM_HEAD] = embedding.clone()  # safetensors does not write one tensor under two names
    if PREFIX + EXPERT_LM_HEAD not in out:
        out[PREFIX + EXPERT_LM_HEAD] = embedding.new_zeros(embedding.shape[0], narrow.shape[0])
    return out


# --- dimensions


def config_of(
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Any],
    vision_heads: int | None,
    horizon: int | None,
) -> tuple[ModelConfig, list[str]]:
    """Dimensions from the tensors' shapes (our names); of config.json (`values`) only what the tensors do not tell.

    vision_heads, horizon: what no file tells.
    ValueError when a tensor that tells a dimension is missing, or when config.json says otherwise than the tensors, or
    than `horizon`.
    """
    sizes = _Sizes(shapes)
    notes = []
    width, patch = sizes.of("backbone.vision.patch_embedding.weight", 0, 2)
    positions = sizes.of("backbone.vision.position_embedding.weight", 0)[0]
    action_dim = sizes.of("flow_head.action_in_proj.weight", 1)[0]
    vision_mlp = sizes.of("backbone.vision.layers.#.fc1.weight", 0)[0]
    vocab_size = sizes.of(EMBEDDING, 0)[0]
    # the expert attends to the language model's keys layer by layer, so what they share is said once
    depth = max(sizes.depth("backbone"), sizes.depth("flow_head"))
    language = sizes.gemma("backbone", depth)
    expert = replace(
        sizes.gemma("flow_head", depth), num_heads=language.num_heads, head_dim=language.head_dim, num_kv_heads=1
    )
    if sizes.missing:
        keys = [to_lerobot(key.replace("#", "0")) for key in sizes.missing]
        raise ValueError("dimensions cannot be read, these keys are missing:\n  " + "\n  ".join(keys))

    if vision_heads is None:
        vision_heads = width // SIGLIP_HEAD_DIM if width % SIGLIP_HEAD_DIM == 0 else SIGLIP_HEADS
        notes.append(
            f"SigLIP's heads are in neither file: taken as {vision_heads} for its width of {width}, unless told"
        )
    check_range("vision_heads", vision_heads, 1)
    if width % vision_heads:
        raise ValueError(f"SigLIP's width of {width} is not a multiple of {vision_heads} heads: give vision_heads")
    image_size = values.get("image_resolution", [round(positions**0.5) * patch])[0]
    stated = values.get("chunk_size", values.get("action_horizon"))
    if None not in (stated, horizon) and stated != horizon:
        raise ValueError(f"config.json says a horizon of {stated}, not {horizon}: leave out the horizon")
    horizon = stated or horizon
    if horizon is None:
        horizon = ModelConfig.horizon
        notes.append(
            f"the horizon is in neither file: taken as π0.5's {horizon}, unless told. Actions of a model that was"
            " trained with another are not its own: pi05_droid has 15, pi05_libero 10 (`pi05 convert --horizon` writes"
            " a folder with theirs, to act and to begin a training with)"
        )
    config = ModelConfig(
        vision=VisionConfig(image_size, patch, width, sizes.depth("backbone.vision"), vision_mlp, vision_heads),
        language=language,
        expert=expert,
        vocab_size=vocab_size,
        horizon=horizon,
        action_dim=action_dim,
    )
    _check_config(values, config, positions)
    return config, notes


_VARIANT_WIDTH = {"gemma_2b": 2048, "gemma_300m": 1024}
_LEROBOT_CONSTANTS = {"min_period": 4e-3, "max_period": 4.0}  # of the time features; no tensor tells them


def _check_config(values: Mapping[str, Any], config: ModelConfig, positions: int) -> None:
    image_size, patch, action_dim = config.vision.image_size, config.vision.patch_size, config.action_dim
    problems = []
    if (kind := values.get("type", "pi05")) != "pi05":
        problems.append(f"type is {kind!r}, not 'pi05'")
    for name in ("max_action_dim", "action_dim"):
        if values.get(name, action_dim) != action_dim:
            problems.append(f"{name} is {values[name]}, but action_in_proj takes {action_dim}")
    if len(set(values.get("image_resolution", []))) > 1:
        problems.append(f"image_resolution is {values['image_resolution']}, but the position embeddings are a square's")
    if (image_size // patch) ** 2 != positions:
        problems.append(
            f"image_resolution {image_size} with patches of {patch} makes {(image_size // patch) ** 2} of them, but"
            f" there are {positions} position embeddings"
        )
    actions = (values.get("output_features") or {}).get("action", {}).get("shape", [0])[0]
    if actions > action_dim:
        problems.append(f"output_features has {actions} action dimensions, but action_in_proj takes {action_dim}")
    for name, default in _LEROBOT_CONSTANTS.items():
        if values.get(name, default) != default:
            problems.append(f"{name} is {values[name]}, but π0.5's is {default}")
    variants = {"paligemma": values.get("paligemma_variant"), "action_expert": values.get("action_expert_variant")}
    if variants["paligemma"] and len(set(variants.values())) == 1 and config.language != config.expert:
        problems.append(f"paligemma and the action expert are both {variants['paligemma']}, but their weights differ")
    for name, gemma in (("paligemma", config.language), ("action_expert", config.expert)):
        variant = variants[name]
        stated = _VARIANT_WIDTH.get(variant or "")
        # a width that is no variant's was built by changing LeRobot's constants: the name says nothing then
        if stated is not None and gemma.width in _VARIANT_WIDTH.values() and stated != gemma.width:
            problems.append(f"{name}_variant is {variant} of width {stated}, but the weights' width is {gemma.width}")
    if problems:
        raise ValueError("config.json contradicts the weights:\n  " + "\n  ".join(problems))


class _Sizes:
    """Dimensions by key; of a layer's tensor, what most layers say, so that one odd layer is named as the odd one."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.missing: list[str] = []

    def of(self, key: str, *axes: int) -> tuple[int, ...]:
        pattern = re.compile(re.escape(key).replace(r"\#", r"\d+"))
        votes = Counter(
            tuple(shape[axis] for axis in axes)
            for name, shape in self.shapes.items()
            if pattern.fullmatch(name) and len(shape) > max(axes)
        )
        if not votes:
            self.missing.append(key)
            return (1,) * len(axes)
        return votes.most_common(1)[0][0]

    def depth(self, tower: str) -> int:
        numbers = [re.match(rf"{re.escape(tower)}\.layers\.(\d+)\.", key) for key in self.shapes]
        return 1 + max((int(match[1]) for match in numbers if match), default=0)

    def gemma(self, tower: str, depth: int) -> GemmaConfig:
        # π0.5's attention is multi-query: the one key head's rows are the head's width
        head_dim, width = self.of(f"{tower}.layers.#.self_attn.k_proj.weight", 0, 1)
        query = self.of(f"{tower}.layers.#.self_attn.q_proj.weight", 0)[0]
        mlp = self.of(f"{tower}.layers.#.mlp.gate_proj.weight", 0)[0]
        if self.missing:
            return GemmaConfig()
        return GemmaConfig(width, depth, mlp, query // head_dim, 1, head_dim)
