"""Single samples as a person looks at them: frames with prompt, prediction and truth, or a chunk beside its truth."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pi05_lightning.evaluation.examples import Example
from pi05_lightning.types import Box, text_to_boxes

TRUTH, PREDICTED = "#009E73", "#D55E00"  # Okabe and Ito's green and vermilion, told apart with any colour vision
DRAWN_DIMS = 8  # panels of a chunk; a humanoid's other thirty are in the metrics


def draw_example(example: Example) -> Figure:
    """The sample's frames with its text and boxes; for actions, beside them, the chunk per dim."""
    return _draw_chunk(example) if example.actions is not None else _draw_text(example)


def _draw_text(example: Example) -> Figure:
    figure = Figure(figsize=(4.4, 3.5), layout="constrained")
    figure.suptitle(_wrap(example.prompt or str(example.subset), 60), fontsize=9, x=0.02, ha="left")
    columns = max(1, len(example.images))
    grid = figure.add_gridspec(2, columns, height_ratios=(5, 1.3))
    for place, (camera, image) in enumerate(example.images.items()):
        boxes = text_to_boxes(example.truth), text_to_boxes(example.predicted)
        _draw_frame(figure.add_subplot(grid[0, place]), camera, image, *boxes)
    words = figure.add_subplot(grid[1, :])
    words.set_axis_off()
    right = example.predicted == example.truth
    predicted = readable(example.predicted) or "(nothing)"
    words.text(0, 1, "predicted: " + _wrap(predicted, 58, 2), color=TRUTH if right else PREDICTED, fontsize=9, va="top")
    if not right:
        words.text(0, 0.35, "true: " + _wrap(readable(example.truth), 58, 2), color=TRUTH, fontsize=9, va="top")
    return figure


def _draw_chunk(example: Example) -> Figure:
    assert example.actions is not None
    assert example.draws is not None
    dims = min(example.actions.shape[1], DRAWN_DIMS)
    columns = min(dims, 2 if dims <= 4 else 4)
    rows = -(-dims // columns)
    figure = Figure(figsize=(6.6, max(2.2, 1.5 * rows)), layout="constrained")
    figure.suptitle(_wrap(example.prompt, 92), fontsize=8, x=0.02, ha="left")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 3.4)))
    frames = np.atleast_1d(left.subplots(max(1, len(example.images)), 1))
    for axes in frames:
        axes.set_axis_off()
    for axes, (camera, image) in zip(frames, example.images.items(), strict=False):
        _draw_frame(axes, camera, image)
    panels = right.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for dim, axes in enumerate(panels[:dims]):
        draw_dim(axes, example.actions[:, dim], example.draws[:, :, dim])
        axes.set_title(f"dim {dim}", fontsize=8, loc="left", pad=2)
    for axes in panels[dims:]:
        axes.set_axis_off()
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def draw_dim(axes: Axes, truth: np.ndarray, draws: np.ndarray) -> None:
    """One dim of a chunk, truth f32[T], beside the envelope and the median of its draws f32[K T]."""
    steps = np.arange(len(truth))
    finite = np.isfinite(draws).all()
    if len(draws) > 1 and finite:
        axes.fill_between(steps, draws.min(0), draws.max(0), color=PREDICTED, alpha=0.22, linewidth=0, label="draws")
    # with markers: of a chunk near the episode's end one step may be left
    axes.plot(
        steps,
        np.median(draws, 0),
        color=PREDICTED,
        linewidth=1.3,
        marker=".",
        label="predicted" if finite else "no number",
    )
    axes.plot(steps, truth, color=TRUTH, linewidth=1.3, marker=".", label="true")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_frame(
    axes: Axes, camera: str, image: np.ndarray, true_boxes: Sequence[Box] = (), predicted_boxes: Sequence[Box] = ()
) -> None:
    height, width = image.shape[:2]
    axes.imshow(image.clip(0, 255).astype(np.uint8))
    axes.set_axis_off()
    axes.set_title(camera.removeprefix("observation.images."), fontsize=7, color="#666666")
    for boxes, color, style in ((true_boxes, TRUTH, "-"), (predicted_boxes, PREDICTED, "--")):
        for top, left, bottom, right in boxes:
            corner = (left * width - 0.5, top * height - 0.5)
            size = ((right - left) * width, (bottom - top) * height)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linestyle=style, linewidth=1.6))


def readable(text: str) -> str:
    """A text with its coordinates as a person reads them: `<loc0512>` becomes `.50`."""
    return re.sub(r"<loc(\d+)>", lambda found: f" .{int(found[1]) * 100 // 1024:02d}", text).strip()


def _wrap(text: str, width: int, lines: int = 3) -> str:
    # $ would be mathematics to matplotlib
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width, max_lines=lines)) or " "
