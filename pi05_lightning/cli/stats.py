"""`pi05 stats`: exact per-dimension statistics of a dataset, before training on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pi05_lightning.data.errors import OnBadSample
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.lerobot_files import LeRobotFiles, dim_names
from pi05_lightning.data.sources.lerobot import Frames, LeRobotConfig, LeRobotSource
from pi05_lightning.data.statistics import FeatureStats, vector_keys
from pi05_lightning.evaluation.report.tables import table_of
from pi05_lightning.files.ranges import check_range
from pi05_lightning.files.suggestion import suggestion

STATE, ACTION, NEXT = "observation.state", "action", "next."

console = Console()


def stats(
    dataset: str,
    keys: list[str] | None = None,
    cameras: dict[str, str] | None = None,
    convert_images: bool = False,
    val_fraction: float = 0.1,
    episodes: list[int] | str | None = None,
    subtask_key: str | None = None,
    relative_dims: list[int] | None = None,
    relative_state_dims: list[int] | None = None,
    horizon: int = 50,
    min_range: float | None = None,
    task: str | None = None,
    labels: str | None = None,
    frames: Frames = "all",
    on_bad_sample: OnBadSample = "error",
) -> None:
    """Exact statistics of a LeRobot dataset's states and actions, per dimension, over what is trained on.

    Those of a state are over the training frames. Those of a feature whose name begins with `action`, as LeRobot tells
    an action, are over the steps of their chunks.

    Args:
        dataset: folder or Hub id.
        keys: features to look at, in the order of the source's state_keys and action_keys; by default observation.state
            and action, and all vectors of floating-point numbers but `next.*`, as rewards, where one of the two is not
            there.
        cameras: image features, each with its camera name, as in training: frames without an image do not count.
        convert_images: grey and transparent images are taken too, as in training.
        val_fraction: share of episodes held out, as in training.
        episodes: only these, as [0,3], or those that meet an SQL condition on their metadata, as "length >= 50".
        subtask_key: column of subtasks, as in training, which decides too which episodes are held out.
        relative_dims: dims of the action to take relative to the states among the keys at the chunk's first step, where
            none is named to observation.state.
        relative_state_dims: dims of the state that these are relative to, where they are other numbers.
        horizon: steps of a chunk: the source's horizon_steps, or else the model's horizon.
        min_range: range that dims of less are widened to, as in training, for the notes and what is too far out.
        task: sentence for frames that have none, as in training.
        labels: file of `pi05 value label`, or `positive`, as in training.
        frames: only `corrections`, or those whose advantage is `positive` or `negative` in `labels`, as in training.
        on_bad_sample: whether bad frames are an error or left out, as in training.
    """
    check_range("horizon", horizon, 1)
    files = LeRobotFiles.open(find_dataset(dataset))
    known = vector_keys(files)
    if not keys:
        keys = [STATE, ACTION] if {STATE, ACTION} <= {*known} else [k for k in known if not k.startswith(NEXT)]
        keys.sort(key=lambda key: key not in (STATE, ACTION))  # first those that relative_dims count
    for key in keys:
        if key not in known:
            raise ValueError(f"keys: {dataset} has no {key!r}{suggestion(key, known)}; it has {', '.join(known)}")
    action_keys = [key for key in dict.fromkeys(keys) if key.startswith(ACTION)]
    state_keys = [key for key in dict.fromkeys(keys) if key not in action_keys]
    if relative_dims and STATE in files.features and not state_keys:
        state_keys = [STATE]
    if relative_dims and not state_keys:
        others = [key for key in known if not key.startswith((ACTION, NEXT))]
        raise ValueError(
            f"relative_dims are relative to a state, and {dataset} has no {STATE}: name its own among the keys, as"
            f" --keys '[{', '.join([*others[:1], *keys])}]'"
        )
    config = LeRobotConfig(
        path=dataset,
        cameras=cameras,
        convert_images=convert_images,
        state_keys=state_keys,
        action_keys=action_keys,
        relative_dims=relative_dims or [],
        relative_state_dims=relative_state_dims,
        subtask_key=subtask_key,
        val_fraction=val_fraction,
        episodes=episodes,
        min_range=min_range,
        task=task,
        labels=labels,
        frames=frames,
        on_bad_sample=on_bad_sample,
    )
    source = LeRobotSource(config, dataset, "train", horizon, image_size=(0, 0), answers=False)
    if on_bad_sample == "skip":
        source.checked_robot()  # training leaves out what its statistics do not explain
    for names, found in zip((config.state_keys, config.action_keys), source.statistics(), strict=True):
        start = 0
        for key in names:
            stop = start + files.features[key]["shape"][0]
            if key in keys:
                dims = dim_names(files.features[key]) or [""] * (stop - start)
                console.print(feature_table(key, found.part(slice(start, stop)), dims, min_range or 0.0))
            start = stop
    console.print(f"{len(source)} frames of {len(set(source.episode))} training episodes", highlight=False)


def feature_table(key: str, feature: FeatureStats, names: Sequence[str], min_range: float) -> Table:
    """min_range: the least range that a dimension is normalised by."""
    parts = ("mean", "std", "min", "q01", "q99", "max")
    table = table_of(key, ["dim"], [*parts, "outside"])
    table.add_column("note")
    normalize = feature.quantiles.widened(min_range).normalize
    furthest = np.abs([normalize(value) for value in (feature.min, feature.max)]).max(0)
    for dim, name in enumerate(names):
        numbers = [getattr(feature, part)[dim] for part in parts]
        share = f"{feature.outside[dim]} ({feature.outside[dim] / feature.count[dim]:.1%})"
        note = remark(feature, dim, furthest[dim], min_range)
        table.add_row(escape(f"{dim} {name}"), *(f"{number:.4g}" for number in numbers), share, note)
    return table


def remark(feature: FeatureStats, dim: int, furthest: float, min_range: float) -> str:
    if feature.constant[dim]:
        return "constant"
    if feature.zero_range[dim] and not min_range:
        return "q01 = q99: its rare values explode when normalised"
    return f"reaches {furthest:.1f} when normalised" if furthest > 3 else ""  # 3: far from the -1..1 that models learn
