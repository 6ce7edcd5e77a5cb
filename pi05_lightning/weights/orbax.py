"""π0.5 as openpi's JAX code saves it: names and axes of its parameters as ours, and reading them with Orbax.

Layers are stacked along a first axis there. `img` is SigLIP, `llm` both Gemmas: names with `_1` are the expert's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.files.local import first_line

PARAMS, TRAIN_STATE = "params", "train_state"
"""Folders of a checkpoint: what it is used with (the average if there is one), and what training goes on with."""
WRITTEN = ("_METADATA", "manifest.ocdbt")
"""Files that Orbax writes into each folder, of which a broken download may lack some."""
LORA_A, LORA_B = "lora_a", "lora_b"
WRONG_RANK = (RuntimeError, IndexError, TypeError)
"""What torch raises where a tensor has other axes than it is asked for."""

Rule = tuple[str, Callable[[Tensor], Tensor]]
"""Our name, with # for a layer's number, and what makes our tensor of theirs (of one layer)."""


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _heads_out(x: Tensor) -> Tensor:
    """[N D H] -> [N·H D]"""
    return x.permute(0, 2, 1).flatten(0, 1)


def _rules() -> Iterator[tuple[str, tuple[Rule, ...]]]:
    """Their name: ours."""
    image, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    vision, layer = "backbone.vision", "backbone.vision.layers.#"
    yield f"{image}/embedding/kernel", ((f"{vision}.patch_embedding.weight", lambda x: x.permute(3, 2, 0, 1)),)
    yield f"{image}/embedding/bias", ((f"{vision}.patch_embedding.bias", _same),)
    yield f"{image}/pos_embedding", ((f"{vision}.position_embedding.weight", lambda x: x.flatten(0, -2)),)
    for theirs, ours in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        yield f"{block}/{theirs}/scale", ((f"{layer}.{ours}.weight", _same),)
        yield f"{block}/{theirs}/bias", ((f"{layer}.{ours}.bias", _same),)
    for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        yield f"{block}/MlpBlock_0/{theirs}/kernel", ((f"{layer}.{ours}.weight", _transposed),)
        yield f"{block}/MlpBlock_0/{theirs}/bias", ((f"{layer}.{ours}.bias", _same),)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value"):
        ours = f"{layer}.self_attn.{name[0]}_proj"
        yield f"{attention}/{name}/kernel", ((f"{ours}.weight", lambda x: x.flatten(1).mT),)
        yield f"{attention}/{name}/bias", ((f"{ours}.bias", torch.flatten),)
    yield f"{attention}/out/kernel", ((f"{layer}.self_attn.out_proj.weight", lambda x: x.flatten(0, 1).mT),)
    yield f"{attention}/out/bias", ((f"{layer}.self_attn.out_proj.bias", _same),)
    yield f"{image}/Transformer/encoder_norm/scale", ((f"{vision}.post_layernorm.weight", _same),)
    yield f"{image}/Transformer/encoder_norm/bias", ((f"{vision}.post_layernorm.bias", _same),)
    yield f"{image}/head/kernel", ((f"{vision}.projector.weight", _transposed),)
    yield f"{image}/head/bias", ((f"{vision}.projector.bias", _same),)
    yield "PaliGemma/llm/embedder/input_embedding", (("backbone.embed_tokens.weight", _same),)
    for end, tower in (("", "backbone"), ("_1", "flow_head")):
        llm, layer = "PaliGemma/llm/layers", f"{tower}.layers.#"
        attention = f"{layer}.self_attn"
        yield f"{llm}/attn/q_einsum{end}/w", ((f"{attention}.q_proj.weight", _heads_out),)
        yield (
            f"{llm}/attn/kv_einsum{end}/w",
            (
                (f"{attention}.k_proj.weight", lambda x: _heads_out(x[0])),
                (f"{attention}.v_proj.weight", lambda x: _heads_out(x[1])),
            ),
        )
        yield f"{llm}/attn/attn_vec_einsum{end}/w", ((f"{attention}.o_proj.weight", lambda x: x.flatten(0, 1).mT),)
        yield (
            f"{llm}/mlp{end}/gating_einsum",
            ((f"{layer}.mlp.gate_proj.weight", lambda x: x[0].mT), (f"{layer}.mlp.up_proj.weight", lambda x: x[1].mT)),
        )
        yield f"{llm}/mlp{end}/linear", ((f"{layer}.mlp.down_proj.weight", _transposed),)
        for theirs, ours in (
            (f"{llm}/pre_attention_norm{end}", f"{layer}.input_layernorm"),
            (f"{llm}/pre_ffw_norm{end}", f"{layer}.post_attention_layernorm"),
            (f"PaliGemma/llm/final_norm{end}", f"{tower}.norm"),
        ):
            if end:  # adaRMS
                yield f"{theirs}/Dense_0/kernel", ((f"{ours}.dense.weight", _transposed),)
                yield f"{theirs}/Dense_0/bias", ((f"{ours}.dense.bias", _same),)
            else:
                yield f"{theirs}/scale", ((f"{ours}.weight", _same),)
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
        yield f"{name}/kernel", ((f"flow_head.{name}.weight", _transposed),)
        yield f"{name}/bias", ((f"flow_head.{name}.bias", _same),)


RULES = dict(_rules())
VISION_HEADS = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
"""[layers, width, heads, width of a head]"""


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each leaf's path, the leaf, and it as a tree of its own.

    `value`, the leaf that training puts below each, is left out of the path.
    """
    for name, inner in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(inner, Mapping):
            yield from ((below, leaf, {name: alone}) for below, leaf, alone in leaves(inner, path))
        else:
            yield (prefix if name == "value" else path), inner, {name: inner}


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by their path."""
    return {path: leaf for path, leaf, _ in leaves(tree)}


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With LoRA's matrices added to the weights that they stand beside, at the scale of openpi's variants, 1.

    The output projection's LoRA sums over the heads between its two matrices, as openpi computes it.
    """
    whole = {name: tensor for name, tensor in tensors.items() if LORA_A not in name and LORA_B not in name}
    begins = {name.replace(LORA_B, LORA_A).removesuffix(LORA_A) for name in tensors.keys() - whole.keys()}
    # beside .../q_einsum/w is .../q_einsum/lora_a, beside .../linear is .../linear_lora_a
    bases = {begin: f"{begin}w" if begin.endswith("/") else begin.removesuffix("_") for begin in sorted(begins)}
    wanted = {begin: (base, begin + LORA_A, begin + LORA_B) for begin, base in bases.items()}
    if missing := [name for names in wanted.values() for name in names if name not in tensors]:
        told = "\n  ".join(missing)
        raise ValueError(f"a LoRA is two matrices beside a weight, and of some a part is missing:\n  {told}")
    odd = []
    for begin, (base, first, second) in wanted.items():
        weight, a, b = whole[base], tensors[first].float(), tensors[second].float()
        try:
            if "attn_vec_einsum" in begin:
                b = b.sum(-3, keepdim=True)
            change = a @ b
        except WRONG_RANK:
            change = None
        if change is not None and weight.ndim == a.ndim == b.ndim and change.shape == weight.shape:
            whole[base] = (weight.float() + change).to(weight.dtype)
        else:
            odd += [f"misshaped: {name} {list(tensors[name].shape)}" for name in (base, first, second)]
    if odd:
        told = "\n  ".join(odd)
        raise ValueError(f"a LoRA is two matrices beside a weight, and of some the shapes do not fit:\n  {told}")
    return whole


def ours(tensors: Mapping[str, Tensor], where: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """openpi's parameters under our names, and for each of ours where it came from.

    ValueError that lists all that is missing, all that π0.5 does not have, and all of another number of axes.
    """
    tensors = merged(tensors)
    problems = [f"missing: {name}" for name in RULES if name not in tensors]
    problems += [f"unexpected: {name} {list(tensors[name].shape)}" for name in tensors if name not in RULES]
    made: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for theirs in (name for name in RULES if name in tensors):
        try:
            found = {key: tensor.contiguous() for key, tensor in _made_of(theirs, tensors[theirs])}
        except WRONG_RANK:
            problems.append(f"misshaped: {theirs} {list(tensors[theirs].shape)}")
        else:
            made, source = made | found, source | dict.fromkeys(found, theirs)
    if problems:
        told = "\n  ".join(problems)
        raise ValueError(f"{where} is no π0.5 of openpi's: {len(problems)} of its parameters do not fit\n  {told}")
    return made, source


def _made_of(theirs: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is ours of one of their parameters, by name; WRONG_RANK where it has other axes than theirs has."""
    for name, make in RULES[theirs]:
        for number, layer in enumerate(tensor) if "#" in name else [(0, tensor)]:
            yield name.replace("#", str(number)), make(layer)


# --- on disk


def is_orbax(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of openpi's JAX code, or is its `params` itself; whole or not."""
    if (folder / PARAMS).is_dir() and (folder / "assets").is_dir():
        return True
    return any((place / name).is_file() for place in (folder, folder / PARAMS) for name in WRITTEN)


def checkpoint_folder(folder: Path) -> Path:
    """The folder with `params` and `assets`."""
    return folder.parent if folder.name == PARAMS and not (folder / PARAMS).is_dir() else folder


class OrbaxParams:
    """The parameters of a checkpoint.

    averaged: those that it is used with; else those that training goes on with, where they are others.
    """

    def __init__(self, folder: Path, averaged: bool) -> None:
        try:
            import orbax.checkpoint
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{folder} was saved with Orbax, which is read with the extra orbax: pip install orbax-checkpoint"
            ) from error
        self.orbax, self.averaged = orbax.checkpoint, averaged
        self.place, self.tree = folder / PARAMS, self.read_metadata(folder / PARAMS)
        if not averaged and (folder / TRAIN_STATE).is_dir():
            found = self.read_metadata(folder / TRAIN_STATE)
            if found.get(PARAMS):
                self.place, self.tree = folder / TRAIN_STATE, found
        if not isinstance(self.tree.get(PARAMS), Mapping):
            raise ValueError(f"{self.place} has no {PARAMS}, but {', '.join(self.tree) or 'nothing'}: name another")

    def read_metadata(self, place: Path) -> Mapping[str, Any]:
        try:
            with self.orbax.PyTreeCheckpointer() as checkpointer:
                found = checkpointer.metadata(place.absolute()).item_metadata
        except Exception as error:  # whatever Orbax and what is below it think of damaged files
            raise ValueError(f"{place} cannot be read by Orbax ({first_line(error)}): copy it again, whole") from error
        if found is None:
            absent = next((name for name in WRITTEN if not (place / name).is_file()), "some of its files")
            raise ValueError(f"{place} cannot be read by Orbax, as it lacks {absent}: copy it again, whole")
        return found.tree

    def on_meta(self) -> dict[str, Tensor]:
        """Types and shapes alone."""
        return {
            name: torch.empty(leaf.shape, dtype=getattr(torch, str(np.dtype(leaf.dtype))), device="meta")
            for name, leaf in flat(self.tree[PARAMS]).items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in memory. ValueError for damaged files, which lists the parameters that they hold."""
        parameters = self.tree[PARAMS]
        try:
            return self.restore(parameters)
        except Exception as error:  # as above
            broken = [name for name, _, alone in leaves(parameters) if not self.is_whole(alone)]
            told = "\n  ".join(broken) or first_line(error)
            raise ValueError(f"{self.place} is damaged: copy it again, whole. Missing:\n  {told}") from error

    def restore(self, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
        wanted = {PARAMS: parameters}
        arguments = mapped(wanted, lambda _: self.orbax.ArrayRestoreArgs(restore_type=np.ndarray))
        with self.orbax.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore(self.place.absolute(), item=wanted, restore_args=arguments, transforms={})
        return {name: as_tensor(array) for name, array in flat(found[PARAMS]).items()}

    def is_whole(self, parameters: Mapping[str, Any]) -> bool:
        try:
            self.restore(parameters)
        except Exception:  # as above
            return False
        return True


def mapped(tree: Mapping[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: mapped(of, make) if isinstance(of, Mapping) else make(of) for name, of in tree.items()}


def as_tensor(array: np.ndarray) -> Tensor:
    """Of bf16 too, which NumPy itself does not know."""
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def vision_heads(tensors: Mapping[str, Tensor]) -> int | None:
    """SigLIP's heads, which openpi's shapes tell."""
    found = tensors.get(VISION_HEADS)
    return None if found is None or found.ndim != 4 or not math.prod(found.shape) else found.shape[2]
