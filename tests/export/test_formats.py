"""Weights in fewer bits: less space, and how far off a graph is then."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from pi05_lightning.export.formats import needed, quietly, save_openvino
from pi05_lightning.export.graphs import graphs_of
from pi05_lightning.export.runner import open_openvino
from tests.untrained import untrained_model


def test_fewer_bits_take_less_space_and_cost_exactness(tmp_path: Path) -> None:
    model = untrained_model().requires_grad_(False)
    graph, outputs, sizes = graphs_of(model, model.config.horizon)["language"], {}, {}
    inputs = {
        name: example.numpy() for name, example in zip(graph.inputs, graph.program.example_inputs[0], strict=True)
    }
    inputs["x"] = np.random.default_rng(0).standard_normal(inputs["x"].shape, np.float32)
    for stored in ("float32", "int8", "int4"):
        with quietly():
            save_openvino(graph, tmp_path / f"{stored}.xml", stored)
        outputs[stored] = open_openvino(tmp_path / f"{stored}.xml")(**inputs)[graph.outputs.index("logits")]
        sizes[stored] = (tmp_path / f"{stored}.bin").stat().st_size
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.raise_signal(signal.SIGUSR1)  # ends a process that is left without its stack for signals
    signal.signal(signal.SIGUSR1, previous)
    size = np.abs(outputs["float32"]).max()
    errors = {stored: np.abs(found - outputs["float32"]).max() / size for stored, found in outputs.items()}
    assert sizes["int4"] < sizes["int8"] < 0.4 * sizes["float32"]
    assert 0 < errors["int8"] < 0.03
    assert errors["int8"] < errors["int4"] < 0.3


def test_fewer_bits_are_of_openvino_alone() -> None:
    assert needed("openvino", "int8") == ("openvino", "nncf")
    assert needed("onnx", "float32") == ("onnxscript", "onnxruntime")
    with pytest.raises(ValueError, match="--dtype int4 is of --format openvino alone"):
        needed("onnx", "int4")
