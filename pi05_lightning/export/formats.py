"""Graphs as files of the formats that other engines open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from pi05_lightning.export.graphs import Graph

Format = Literal["openvino", "onnx", "pt2"]
Stored = Literal["float32", "int8", "int4"]
"""What weights are stored in; 8 and 4 bits in OpenVINO's format alone."""
ENDINGS: dict[Format, str] = {"openvino": ".xml", "onnx": ".onnx", "pt2": ".pt2"}
PACKAGES: dict[Format, tuple[str, ...]] = {"openvino": ("openvino",), "onnx": ("onnxscript", "onnxruntime"), "pt2": ()}
"""What a format needs here, to be written and compared."""
GROUP = 32
"""Weights of a row that share a scale in 4 bits; a row that it does not divide takes fewer."""


def needed(format: Format, stored: Stored) -> tuple[str, ...]:
    """The packages that an export takes. ValueError where the format has no such weights."""
    if stored == "float32":
        return PACKAGES[format]
    if format != "openvino":
        raise ValueError(f"--dtype {stored} is of --format openvino alone, and {format} stores float32")
    return (*PACKAGES[format], "nncf")


def save_openvino(graph: Graph, path: Path, stored: Stored) -> None:
    import openvino

    model = openvino.convert_model(graph.program)
    for ports, names in ((model.inputs, graph.inputs), (model.outputs, graph.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.tensor.set_names({name})
    if stored != "float32":
        model = compressed(model, stored)
    openvino.save_model(model, path, compress_to_fp16=False)


def compressed(model: Any, stored: Stored) -> Any:
    """An OpenVINO model whose weights are stored in 8 bits, a scale per row, or in 4 bits, a scale per group of a row.

    In 4 bits the first and the last layers keep 8, as NNCF chooses them.

    NNCF makes many an `openvino.Core` of its own. On processors with AMX each gives its thread a stack for signals, and
    takes it back at its end (`runner._openvino_core` says what that does), so they get a thread of their own.
    """
    import nncf

    if stored == "int8":
        options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    else:
        fitting = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        options = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "ratio": 1.0, "group_size": GROUP}
        options["advanced_parameters"] = fitting
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(nncf.compress_weights, model, **options).result()


def save_onnx(graph: Graph, path: Path, stored: Stored) -> None:
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    program = torch.onnx.export(graph.program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert program is not None
    program.save(path)


def save_pt2(graph: Graph, path: Path, stored: Stored) -> None:
    torch.export.save(graph.program, path)


SAVE: dict[Format, Callable[[Graph, Path, Stored], None]] = {
    "openvino": save_openvino,
    "onnx": save_onnx,
    "pt2": save_pt2,
}
"""Write a graph, its weights stored as `needed` allows."""


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
