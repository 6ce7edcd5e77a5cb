"""`pi05 stats` and `pi05 tokenizer`: what there is to know about a dataset before training on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.lerobot_files import LeRobotFiles, find_dataset
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.split import Split
from pi05_lightning.data.statistics import CACHE, FeatureStats, Relative, load_or_compute, vector_keys
from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.files.shipped import find_config

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
        console.print(_feature_table(key, found[key], _dim_names(files, key)))
    console.print(f"{len(chosen)} training episodes. Written to {files.root / CACHE}", soft_wrap=True, highlight=False)


def _dim_names(files: LeRobotFiles, key: str) -> list[str]:
    names = files.features[key].get("names") or []
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    width = files.features[key]["shape"][0]
    return [str(name) for name in names] if len(names) == width else [""] * width


def _feature_table(key: str, feature: FeatureStats, names: Sequence[str]) -> Table:
    table = Table(title=f"{key}: {feature.count} frames", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("dim")
    for heading in ("mean", "std", "min", "q01", "q99", "max", "outside"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note")
    normalized = Quantiles(feature.q01, feature.q99)
    furthest = np.abs([normalized.normalize(feature.min), normalized.normalize(feature.max)]).max(0)
    for dim, name in enumerate(names):
        numbers = [getattr(feature, part)[dim] for part in ("mean", "std", "min", "q01", "q99", "max")]
        share = f"{feature.outside[dim]} ({feature.outside[dim] / feature.count:.1%})"
        note = _note(feature, dim, furthest[dim])
        table.add_row(f"{dim} {name}", *(f"{number:.4g}" for number in numbers), share, note)
    return table


def _note(feature: FeatureStats, dim: int, furthest: float) -> str:
    if feature.constant[dim]:
        return "constant"
    if feature.zero_range[dim]:
        return "q01 = q99: its rare values explode when normalised"
    return f"reaches {furthest:.1f} when normalised" if furthest > 3 else ""  # 3: far from the -1..1 that models learn


@dataclass(frozen=True)
class Quality:
    """What a FAST tokenizer does to a dataset's chunks. RMSE is in normalised units, where most actions are -1..1."""

    dataset: str
    chunks: int
    naive_tokens: int
    """One token per action value."""
    mean_tokens: float
    p99_tokens: float
    rmse: list[float]
    """Per dimension, over steps inside the episode."""
    rmse_real: list[float]
    """The same in the dataset's own units."""
    coverage: float
    """Share of the DCT coefficients that the vocabulary spells; the others are clipped."""


def tokenizer(
    dataset: list[str] | str,
    out: Path = Path("fast"),
    horizon: int = 50,
    vocab_size: int = 1024,
    scale: float = 10,
    coverage: float = 1.0,
    action_keys: list[str] = ["action"],  # noqa: B006
    state_keys: list[str] = ["observation.state"],  # noqa: B006
    relative_dims: list[int] = [],  # noqa: B006
    min_range: float | None = None,
    val_fraction: float = 0.1,
    max_chunks: int = 20_000,
    max_rmse: float | None = None,
) -> None:
    """Fit a FAST action tokenizer on LeRobot datasets, and report on episodes that it was not fitted on.

    Chunks at an episode's end repeat its last action, as in training; reconstruction errors leave those steps out.

    Args:
        dataset: folder or Hub id, or several as [a, b]; or a run's YAML, whose LeRobot sources it is fitted on, each
            with its own keys, relative dims and held-out episodes.
        out: folder for the tokenizer, report.json and reconstruction.png.
        horizon: actions in a chunk, the model's `horizon`.
        vocab_size: of the tokenizer, at most the model's `fast_vocab_size`.
        scale: steps per unit of a DCT coefficient; more is more exact and costs tokens.
        coverage: share of coefficients that must be spelled; below 1 rare large ones are clipped.
        action_keys: features concatenated into the action.
        state_keys: features concatenated into the state, for relative dims.
        relative_dims: dims of the action to take relative to the state at the chunk's first step, as in training.
        min_range: widen dims of less range to this, as in training.
        val_fraction: share of episodes held out, as in training.
        max_chunks: of each dataset, evenly spaced.
        max_rmse: fail, and write no tokenizer, when a dimension's error, in normalised units, is larger.

    Raises ValueError when an error exceeds max_rmse, and for datasets that cannot be read.
    """
    given = LeRobotConfig(
        "",
        cameras={},
        state_keys=state_keys if relative_dims else [],
        action_keys=action_keys,
        relative_dims=relative_dims,
        min_range=min_range,
        val_fraction=val_fraction,
    )
    configs = _mixture([dataset] if isinstance(dataset, str) else dataset, given)
    with ThreadPoolExecutor() as pool:  # most of it is in libraries that let go of the interpreter
        read = partial(_read_chunks, horizon=horizon, max_chunks=max_chunks)
        each = track(pool.map(read, configs.values()), "reading", len(configs), console=console, transient=True)
        parts = dict(zip(configs, each, strict=True))
    fast = FastTokenizer.fit(
        [part.train.actions for part in parts.values()], vocab_size, scale, coverage, console.is_terminal
    )
    held_out = {name: part.val if len(part.val.actions) else part.train for name, part in parts.items()}
    results = [_quality(fast, name, chunks) for name, chunks in held_out.items()]
    console.print(_quality_table(results))
    out.mkdir(parents=True, exist_ok=True)
    report = {"horizon": horizon, "scale": scale, "datasets": [asdict(result) for result in results]}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _plot(fast, held_out, results, out / "reconstruction.png")
    worst = max(results, key=lambda result: max(result.rmse))
    error = max(worst.rmse)
    if max_rmse is not None and error > max_rmse:
        raise ValueError(
            f"the largest reconstruction error is {error:.4f} ({worst.dataset}, dim {worst.rmse.index(error)}), above"
            f" max_rmse {max_rmse:g} (see"
            f" {out / 'reconstruction.png'}): raise scale, which is {scale:g}, or fit on more episodes"
            " where coverage is below 100 %. No tokenizer was written"
        )
    fast.save(out)
    console.print(f"{fast.bpe.get_vocab_size()} tokens. Written to {out}", soft_wrap=True, highlight=False)


def _mixture(paths: Sequence[str], given: LeRobotConfig) -> dict[str, LeRobotConfig]:
    """What to read, by name: datasets with the keys that were given, or a YAML file's sources with their own."""
    found: dict[str, LeRobotConfig] = {}
    for path in paths:
        if not path.endswith((".yaml", ".yml")):
            found[path] = replace(given, path=path)
            continue
        content = yaml.safe_load(find_config(path).read_text(encoding="utf-8")) or {}
        for name, source in (content.get("data", {}).get("sources") or {}).items():
            if not str(source.get("class_path")).endswith("LeRobotConfig"):
                continue
            try:
                config = LeRobotConfig(**source.get("init_args", {}))
            except TypeError as error:
                raise ValueError(f"{path}, data.sources.{name}: {error}") from error
            if config.action_keys:
                state_keys = config.state_keys if config.relative_dims else []
                found[name] = replace(config, cameras={}, state_keys=state_keys)
    if not found:
        raise ValueError(f"{', '.join(paths)}: no LeRobotConfig with actions under data.sources")
    return found


@dataclass(frozen=True)
class _Chunks:
    """actions: normalised f32[N T A].  is_pad: bool[N T].  span: f64[A], real units per two normalised ones."""

    actions: np.ndarray
    is_pad: np.ndarray
    span: np.ndarray


@dataclass(frozen=True)
class _Parts:
    train: _Chunks
    val: _Chunks


def _read_chunks(config: LeRobotConfig, horizon: int, max_chunks: int) -> _Parts:
    train, val = (
        LeRobotSource(config, Path(config.path).name, split, horizon, image_size=(0, 0)) for split in get_args(Split)
    )
    robot = train.robot()
    if robot is None or not robot.acts:
        raise ValueError(f"{config.path}: a FAST tokenizer is fitted on actions, and action_keys is empty")

    def chunks(source: LeRobotSource) -> _Chunks:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), max_chunks)).astype(int))
        frames = [robot.transforms.on_frame(source[int(i)]) for i in chosen]
        actions = [frame.actions for frame in frames if frame.actions is not None]
        is_pad = np.array([frame.action_is_pad for frame in frames])
        return _Chunks(np.array(actions, dtype=np.float32), is_pad, robot.normalize.action.span)

    return _Parts(chunks(train), chunks(val))


def _quality(fast: FastTokenizer, path: str, chunks: _Chunks) -> Quality:
    tokens = np.array([len(row) for row in fast.encode(chunks.actions)])
    squared = (fast.reconstruct(chunks.actions) - chunks.actions)[~chunks.is_pad] ** 2
    rmse = np.sqrt(squared.mean(0))
    return Quality(
        dataset=path,
        chunks=len(tokens),
        naive_tokens=int(np.prod(chunks.actions.shape[1:])),
        mean_tokens=float(tokens.mean()),
        p99_tokens=float(np.quantile(tokens, 0.99)),
        rmse=rmse.tolist(),
        rmse_real=(rmse * chunks.span / 2).tolist(),
        coverage=float(1 - fast.quantize(chunks.actions)[1].mean()),
    )


def _quality_table(results: Sequence[Quality]) -> Table:
    title = "FAST on held-out episodes; where there are none, on training episodes"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = ("chunks", "values", "tokens", "p99", "shorter", "RMSE", "worst dim", "coverage")
    table.add_column("dataset", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        rmse = np.array(result.rmse)
        table.add_row(
            result.dataset,
            str(result.chunks),
            str(result.naive_tokens),
            f"{result.mean_tokens:.1f}",
            f"{result.p99_tokens:.0f}",
            f"{result.naive_tokens / result.mean_tokens:.1f}x",
            f"{np.sqrt((rmse**2).mean()):.4f}",
            f"{rmse.max():.4f} ({rmse.argmax()})",
            f"{result.coverage:.2%}",
        )
    return table


def _plot(fast: FastTokenizer, chunks: dict[str, _Chunks], results: Sequence[Quality], path: Path) -> None:
    """One chunk of each dataset, as it is and as it comes back, beside the error of each dimension."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (over_time, per_dim), result in zip(axes, results, strict=True):
        actions = chunks[result.dataset].actions
        typical = int(np.argsort(actions.std(1).sum(1))[len(actions) // 2])
        truth, back = actions[typical], fast.reconstruct(actions[typical : typical + 1])[0]
        for dim in range(truth.shape[1]):
            over_time.plot(truth[:, dim], color=f"C{dim}", alpha=0.5)
            over_time.plot(back[:, dim], color=f"C{dim}", linestyle="--")
        over_time.set(
            title=f"{Path(result.dataset).name}: a typical chunk",
            xlabel="step",
            ylabel="normalised action (dashed: decoded)",
        )
        per_dim.bar(range(len(result.rmse)), result.rmse, color=[f"C{dim}" for dim in range(len(result.rmse))])
        per_dim.set(title="reconstruction error, over all chunks", xlabel="dim", ylabel="RMSE, normalised")
        per_dim.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
