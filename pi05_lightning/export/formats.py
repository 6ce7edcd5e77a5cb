"""Graphs as files of the formats that other engines open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from pi05_lightning.export.graphs import Graph

Format = Literal["openvino", "onnx", "pt2"]
ENDINGS: dict[Format, str] = {"openvino": ".xml", "onnx": ".onnx", "pt2": ".pt2"}
PACKAGES: dict[Format, tuple[str, ...]] = {"openvino": ("openvino",), "onnx": ("onnxscript", "onnxruntime"), "pt2": ()}
"""What a format needs here, to be written and compared."""


def save_openvino(graph: Graph, path: Path) -> None:
    import openvino

    model = openvino.convert_model(graph.program)
    for ports, names in ((model.inputs, graph.inputs), (model.outputs, graph.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.tensor.set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)


def save_onnx(graph: Graph, path: Path) -> None:
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    program = torch.onnx.export(graph.program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert program is not None
    program.save(path)


def save_pt2(graph: Graph, path: Path) -> None:
    torch.export.save(graph.program, path)


SAVE: dict[Format, Callable[[Graph, Path], None]] = {"openvino": save_openvino, "onnx": save_onnx, "pt2": save_pt2}


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the exporters say of themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
