"""`pi05 stats`: exact per-dimension statistics of a dataset, before training on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from pi05_lightning.data.lerobot_files import LeRobotFiles, find_dataset
from pi05_lightning.data.statistics import CACHE, FeatureStats, Relative, load_or_compute, vector_keys
from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.evaluation.report.tables import table_of

console = Console()


def stats(
    dataset: str,
    keys: list[str] | None = None,
    val_fraction: float = 0.1,
    episodes: str | None = None,
    relative_dims: list[int] | None = None,
    horizon: int = 50,
) -> None:
    """Exact statistics of a LeRobot dataset's states and actions, per dimension, over its training episodes.

    Args:
        dataset: folder or Hub id.
        keys: features to look at; by default all vectors of floating-point numbers.
        val_fraction: share of episodes held out, as in training.
        episodes: only episodes that meet an SQL condition on their metadata, as "length >= 50".
        relative_dims: dims of the action to take relative to the state at the chunk's first step.
        horizon: steps of a chunk, for relative dims.
    """
    files = LeRobotFiles.open(find_dataset(dataset))
    chosen = files.choose("train", val_fraction, episodes)
    keys = keys or vector_keys(files)
    relative = Relative(horizon, tuple(relative_dims)) if relative_dims else None
    found = load_or_compute(files.root, keys, chosen.tolist(), relative)
    for key in keys:
        console.print(feature_table(key, found[key], dim_names(files, key)))
    console.print(f"{len(chosen)} training episodes. Written to {files.root / CACHE}", soft_wrap=True, highlight=False)


def dim_names(files: LeRobotFiles, key: str) -> list[str]:
    names = files.features[key].get("names") or []
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    width = files.features[key]["shape"][0]
    return [str(name) for name in names] if len(names) == width else [""] * width


def feature_table(key: str, feature: FeatureStats, names: Sequence[str]) -> Table:
    parts = ("mean", "std", "min", "q01", "q99", "max")
    table = table_of(f"{key}: {feature.count} frames", ["dim"], [*parts, "outside"])
    table.add_column("note")
    normalized = Quantiles(feature.q01, feature.q99)
    furthest = np.abs([normalized.normalize(feature.min), normalized.normalize(feature.max)]).max(0)
    for dim, name in enumerate(names):
        numbers = [getattr(feature, part)[dim] for part in parts]
        share = f"{feature.outside[dim]} ({feature.outside[dim] / feature.count:.1%})"
        note = remark(feature, dim, furthest[dim])
        table.add_row(f"{dim} {name}", *(f"{number:.4g}" for number in numbers), share, note)
    return table


def remark(feature: FeatureStats, dim: int, furthest: float) -> str:
    if feature.constant[dim]:
        return "constant"
    if feature.zero_range[dim]:
        return "q01 = q99: its rare values explode when normalised"
    return f"reaches {furthest:.1f} when normalised" if furthest > 3 else ""  # 3: far from the -1..1 that models learn
