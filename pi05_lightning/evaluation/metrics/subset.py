"""The metrics of every subset, and of every modality over its sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from pi05_lightning.evaluation.metrics.chunk import CHUNK_METRICS
from pi05_lightning.evaluation.metrics.measure import FLOW_TIMES, Measured
from pi05_lightning.evaluation.metrics.weighted_mean import Sums, WeightedMean
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Modality, Subset

SHARES = {"token_accuracy", "exact_match", "box_iou", "decode_success", "action_accuracy"}
"""Metrics of which more is better; of the others, losses and errors, less is."""


class SubsetMetrics:
    """Sums of one subset. Every rank has the same ones, whatever its batches held, so that they can sync."""

    def __init__(self, subset: Subset, model: Pi05, device: torch.device | str = "cpu") -> None:
        chunk = (len(CHUNK_METRICS), model.config.horizon, model.config.action_dim)
        shapes: dict[str, tuple[int, ...]] = {"samples": ()}
        match subset.modality:
            case Modality.CONTINUOUS:
                shapes |= {"flow_loss": (len(FLOW_TIMES),), "chunk": chunk}
            case Modality.FAST:
                shapes |= {"decode_success": (), "chunk": chunk}
            case _:
                shapes |= {"exact_match": (), "box_iou": ()}
        for head_name, head in model.heads.items():
            for name in (name for name, modalities in head.metrics.items() if subset.modality in modalities):
                if name in shapes:
                    raise ValueError(f"model.heads.{head_name} measures {name}, as others do: give it another name")
                shapes[name] = ()
        self.means = {key: WeightedMean(*shape).to(device) for key, shape in shapes.items()}
        for mean in self.means.values():
            mean.update(mean.total, mean.weight)  # nothing: to have counted nothing is a result, not an oversight

    def update(self, measured: Measured) -> None:
        for key, (values, weights) in measured.values.items():
            self.means[key].update(values, weights)
        self.means["samples"].update(measured.error, torch.ones_like(measured.error))

    def sums(self) -> dict[str, Sums]:
        """What all ranks counted."""
        return {key: mean.sums() for key, mean in self.means.items()}


def compute_all(metrics: Mapping[Subset, SubsetMetrics]) -> dict[str, dict[str, float]]:
    """`source/modality` -> metric -> value, and `modality` -> metric -> value where several sources have it.

    `samples` is always there. A metric that nothing was counted for is not, and NaN is a value that is no number.
    Per dim, step and flow time a metric has names such as `action_mae/dim_00`. Across sources, which differ in robots
    and units, there are means alone, and none in real units.
    """
    sums = {subset: metric.sums() for subset, metric in metrics.items()}
    table = {str(subset): values_of(by_key, details=True) for subset, by_key in sums.items()}
    for modality in Modality:
        parts = [by_key for subset, by_key in sums.items() if subset.source and subset.modality is modality]
        if len(parts) > 1:
            pooled = {key: sum((part[key] for part in parts[1:]), start=parts[0][key]) for key in parts[0]}
            values = values_of(pooled, details=False)
            table[str(modality)] = {key: value for key, value in values.items() if not key.endswith("_real")}
    return table


def metric_names(measured: Iterable[Subset], empty: Iterable[Subset], model: Pi05) -> dict[str, dict[str, float]]:
    """The table that `compute_all` may make, with all that can be counted of the subsets that have samples."""
    metrics = {subset: SubsetMetrics(subset, model, model.device) for subset in (*measured, *empty)}
    for subset in measured:
        for mean in metrics[subset].means.values():
            mean.update(torch.ones_like(mean.total), torch.ones_like(mean.weight))
    return compute_all(metrics)


def values_of(sums: Mapping[str, Sums], details: bool) -> dict[str, float]:
    """Metric -> value of one row of the table; `details`: with those of each dim, step and flow time."""
    values: dict[str, float] = {"samples": int(sums["samples"].weight)}
    for key, found in sums.items():
        if key == "chunk":
            for number, name in enumerate(CHUNK_METRICS):
                one = Sums(found.total[number], found.weight[number])
                _add(values, name, one)
                if details:
                    _add_each(values, f"{name}/dim", Sums(one.total.sum(0), one.weight.sum(0)))
                    _add_each(values, f"{name}/step", Sums(one.total.sum(1), one.weight.sum(1)))
        elif key != "samples":
            _add(values, key, found)
            if key == "flow_loss" and details:
                _add_each(values, key, found, [f"/t_{t:.2f}" for t in FLOW_TIMES])
            if key == "cross_entropy" and key in values:
                values["perplexity"] = float(found.mean().exp())
    return values


def _add(values: dict[str, float], name: str, sums: Sums) -> None:
    if sums.weight.sum():
        values[name] = float(sums.mean())


def _add_each(values: dict[str, float], name: str, sums: Sums, labels: list[str] | None = None) -> None:
    labels = labels or [f"_{number:02d}" for number in range(len(sums.total))]
    for label, total, weight in zip(labels, sums.total, sums.weight, strict=True):
        _add(values, name + label, Sums(total, weight))
