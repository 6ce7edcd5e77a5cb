"""How far a value can be trusted: what it predicts beside what came, on episodes that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torchmetrics.functional.classification import binary_auroc, binary_roc

from pi05_lightning.evaluation.report.plots import COLORS, as_svg

BINS = 10
LABELS = ("success", "failure")


def calibration(value: np.ndarray, returns: np.ndarray, success: np.ndarray, seconds: np.ndarray) -> dict[str, Any]:
    """Plain types of values and returns f64[N] and whether the frame's episode succeeded, bool[N].

    seconds f64[N]: the time that a return of -1 stands for.

    mean_error: of |V - R|, and of a constant, the mean return.  mean_error_seconds: of the time to success, in episodes
    that have one; None without.  auc: area under the ROC of success by V; None where all episodes ended alike.  bins:
    [V, R, frames], the means of the frames in tenths by V.
    """
    bins = [[float(value[rows].mean()), float(returns[rows].mean()), len(rows)] for rows in tenths(value)]
    auc = None
    if success.any() and not success.all():
        auc = float(binary_auroc(torch.from_numpy(value + 1).clamp(0, 1), torch.from_numpy(success).long()))
    return {
        "frames": len(value),
        "mean_error": float(np.abs(value - returns).mean()),
        "mean_error_seconds": float((np.abs(value - returns) * seconds)[success].mean()) if success.any() else None,
        "mean_error_of_a_constant": float(np.abs(returns - returns.mean()).mean()),
        "auc": auc,
        "bins": bins,
    }


def tenths(values: np.ndarray) -> list[np.ndarray]:
    """The rows of each tenth by value, i64 each; fewer where there are fewer rows."""
    return [rows for rows in np.array_split(np.argsort(values, kind="stable"), BINS) if len(rows)]


def calibration_plot(value: np.ndarray, returns: np.ndarray, success: np.ndarray, seconds: np.ndarray) -> str:
    """Predicted against actual time to success, per frame and in tenths; beside it the ROC of success. SVG.

    A failure is drawn at the time that it costs.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    predicted, actual = -value * seconds, -returns * seconds
    for ended, label, color in zip((success, ~success), LABELS, COLORS, strict=False):
        left.scatter(predicted[ended], actual[ended], s=4, alpha=0.3, color=color, label=label, rasterized=True)
    means = [[part[rows].mean() for rows in tenths(predicted)] for part in (predicted, actual)]
    left.plot(*means, "o-", color="#444444", label="mean of a tenth")
    left.plot([0, seconds.max()], [0, seconds.max()], ":", color="#444444")
    left.set(xlabel="predicted time to success, s", ylabel="actual time, s; of a failure: what it costs")
    left.legend(frameon=False, fontsize=8)
    if success.any() and not success.all():
        false, true, _ = binary_roc(torch.from_numpy(value + 1).clamp(0, 1), torch.from_numpy(success).long())
        right.plot(false, true, color=COLORS[0])
    right.plot([0, 1], [0, 1], ":", color="#444444")
    right.set(xlabel="failures taken for successes", ylabel="successes recognised", title="ROC of success by V")
    return as_svg(figure)


def histograms(advantages: dict[str, np.ndarray], thresholds: dict[str, float]) -> str:
    """The advantages of each task's frames, f64[N], with its threshold. SVG."""
    figure = Figure(figsize=(8, 2.2 * len(advantages)), layout="constrained")
    for axes, (task, found) in zip(np.atleast_1d(figure.subplots(len(advantages))), advantages.items(), strict=True):
        axes.hist(found, bins=60, color=COLORS[0])
        axes.axvline(thresholds[task], color=COLORS[5], label=f"threshold {thresholds[task]:.3f}")
        axes.set(title=task, ylabel="frames")
        axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="advantage")
    return as_svg(figure)


def film(value: np.ndarray, positive: np.ndarray, images: Sequence[np.ndarray], title: str) -> str:
    """V over the frames of an episode, f64[N], those of positive advantage bool[N] marked, over a strip of images.

    images: u8[3 h w], evenly spaced.  SVG.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=(2, 1))
    frames = np.arange(len(value))
    top.plot(frames, value, color=COLORS[0])
    top.scatter(frames[positive], value[positive], s=16, color=COLORS[2], label="positive advantage", zorder=3)
    top.set(ylim=(-1.05, 0.05), ylabel="V", title=title, xlabel="frame")
    top.legend(frameon=False, fontsize=8)
    below.imshow(np.concatenate([image.transpose(1, 2, 0) for image in images], axis=1))
    below.axis("off")
    return as_svg(figure)
