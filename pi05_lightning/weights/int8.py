"""Weights as a model that computes in 8 bits, and which of its layers do not: measured once, kept beside them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.int8 import REST, ROUNDING, Int8Product, linear_layers
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import Actions
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.safetensors import ContentHash, fill

MEASURE = 2  # of an action's error: raise it when that is measured otherwise
SAMPLE = 4096  # values of each tensor that a fingerprint is made of


class Fingerprint(ContentHash):
    """SHA-256 of values of each tensor, evenly spaced, in bf16; one that is read in another type has the same.

    And of how inputs are rounded and errors measured: a choice that was measured otherwise is made anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add("rounding", torch.tensor([ROUNDING, MEASURE]))

    def add(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        values = tensor.detach().flatten()
        return super().add(name, values[:: max(1, len(values) // SAMPLE)].bfloat16())


class Way(NamedTuple):
    """How a policy acts, where its layers' errors depend on it; hierarchical: it says subtasks before."""

    robot: str
    actions: Actions
    hierarchical: bool


@dataclass(frozen=True)
class Choice:
    """Which linear layers of some weights compute in 8 bits, and why."""

    fingerprint: str
    """Of the weights that it was measured on."""
    way: Way
    """How they acted when it was measured."""
    kept: tuple[str, ...]
    """Layers that stay as they are, those that did not run among them; all others compute in 8 bits."""
    errors: dict[str, float]
    """By layer that ran: the norm of the difference of its output, over that of the output."""
    action_error: float
    """The largest of all actions that were compared, as a share of their dim's range, see `Quantiles.computed_unit`."""

    @staticmethod
    def file(weights: Weights) -> Path:
        """Where it is: beside the checkpoint or the folder, whose own content it must not change."""
        path = weights.path.resolve()
        if path.parent.name == "snapshots":  # of the Hub's cache, which takes a file there for damage
            return path.parent.with_name(f"{path.name}.int8.json")
        return path.with_name(f"{path.name}.int8.json")

    @classmethod
    def read(cls, file: Path) -> dict[Way, Self]:
        """By how the policy acts; none where there is no file. ValueError for a file of other content."""
        try:
            choices = [
                cls(**values | {"way": Way(*values["way"]), "kept": tuple(values["kept"])})
                for values in read_json(file, default={}).get("choices", [])
            ]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{file} does not say which layers compute in 8 bits: delete it to measure anew"
            ) from error
        return {choice.way: choice for choice in choices}

    def write(self, file: Path) -> None:
        """Beside those of other ways of acting."""
        choices = {**self.read(file), self.way: self}
        write_json(file, {"choices": [asdict(choice) for choice in choices.values()]})


def int8_model(weights: Weights, kept: Collection[str] = (), fingerprint: Fingerprint | None = None) -> Pi05:
    """The model, whose linear layers compute in 8 bits but for those in `kept`; the rest has the type `REST`.

    Every weight is packed as soon as it is read, one at a time, so that few are whole at once.  fingerprint: takes note
    of them.  ValueError as `Weights.model`.
    """
    model = Pi05.without_memory(weights.config())
    layers = {name: layer for name, layer in linear_layers(model).items() if name not in kept}
    products: dict[str, Int8Product] = {}
    packing = Lock()

    def keep(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if fingerprint is not None:
            fingerprint.add(name, tensor)
        layer = name.removesuffix(".weight")
        if layer not in layers or tensor.shape != layers[layer].weight.shape:  # which `fill` refuses
            return {name: tensor}
        with packing:
            products[layer] = Int8Product(tensor)
            _return_freed_memory()
        return {}

    tensors = weights.tensors(REST, keep)
    for name in products:
        layers[name].register_parameter("weight", None)
    fill(model, tensors, where=weights.path)
    for name, product in products.items():
        product.bias = layers[name].bias
        model.set_submodule(name, product)
    return model


def _return_freed_memory() -> None:
    """To the system, which glibc does of its own only where nothing that lasts is above it: 1 GiB of the full size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
