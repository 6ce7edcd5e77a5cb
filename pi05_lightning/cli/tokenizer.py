"""`pi05 tokenizer`: fit a FAST action tokenizer, and see what it does to episodes that it was not fitted on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

from pi05_lightning.cli.configuration import read_configuration
from pi05_lightning.data.errors import OnBadSample
from pi05_lightning.data.fast import FastTokenizer, is_tokenizer
from pi05_lightning.data.sources.base import SourceConfig
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.split import Split
from pi05_lightning.evaluation.fast import Chunks, Quality, measure, read_chunks
from pi05_lightning.evaluation.report.tables import table_of
from pi05_lightning.files.local import check_writable, write_json
from pi05_lightning.files.ranges import check_range
from pi05_lightning.files.yaml_files import is_yaml
from pi05_lightning.models.config import ModelConfig

REFUSED = "refused"
console = Console()


def tokenizer(
    dataset: list[str] | str,
    out: Path = Path("fast"),
    horizon: int | None = None,
    vocab_size: int | None = None,
    scale: float = 10,
    coverage: float = 1.0,
    merge: bool = True,
    action_keys: list[str] | None = None,
    state_keys: list[str] | None = None,
    relative_dims: list[int] | None = None,
    relative_state_dims: list[int] | None = None,
    horizon_steps: int | None = None,
    min_range: float | None = None,
    val_fraction: float | None = None,
    episodes: list[int] | str | None = None,
    subtask_key: str | None = None,
    on_bad_sample: OnBadSample | None = None,
    max_chunks: int = 20_000,
    max_rmse: float | None = None,
    overwrite: bool = False,
) -> None:
    """Fit a FAST action tokenizer on LeRobot datasets, and report on episodes that it was not fitted on.

    Chunks at an episode's end repeat its last action, as in training; reconstruction errors leave those steps out.

    Args:
        dataset: folder or Hub id, or several as [a, b]; or a run's YAML, whose LeRobot sources it is fitted on, each
            with its own keys, relative dims, range and held-out episodes; these options are then refused.
        out: folder for the tokenizer, report.json and reconstruction.png.
        horizon: actions in a chunk; by default the `horizon` of a YAML's model.config, else 50.
        vocab_size: of the tokenizer; by default the `fast_vocab_size` of a YAML's model.config, else 1024.
        scale: steps per unit of a DCT coefficient; more is more exact and costs tokens.
        coverage: share of coefficients that must be spelled; below 1 rare large ones are clipped.
        merge: spell frequent sequences of coefficients as one token, as FAST does. Without it every coefficient is a
            token: a small model learns that from less data, and a large one writes several times as many tokens.
        action_keys: features concatenated into the action; by default [action].
        state_keys: features concatenated into the state, for relative dims; by default [observation.state].
        relative_dims: dims of the action to take relative to the state at the chunk's first step, as in training.
        relative_state_dims: dims of the state that these are relative to, where they are other numbers.
        horizon_steps: frames of a chunk where they are fewer than `horizon`, as in training.
        min_range: widen dims of less range to this, as in training.
        val_fraction: share of episodes held out, as in training; by default 0.1.
        episodes: only these, as [0,3], or those that meet an SQL condition on their metadata, as "length >= 50".
        subtask_key: column of subtasks, as in training, which decides too which episodes are held out.
        on_bad_sample: whether bad frames are an error, the default, or left out, as in training.
        max_chunks: of each dataset, evenly spaced.
        max_rmse: fail, and write no tokenizer, when a dimension's error, in normalised units, is larger; the report is
            then in `out`/refused.
        overwrite: replace a tokenizer that `out` holds; policies act with the one that they were trained with.

    Raises ValueError when `out` holds a tokenizer and may not be overwritten, when an error exceeds max_rmse, and for
    datasets and options that do not fit.
    """
    options = {
        "action_keys": action_keys,
        "state_keys": state_keys,
        "relative_dims": relative_dims,
        "relative_state_dims": relative_state_dims,
        "horizon_steps": horizon_steps,
        "min_range": min_range,
        "val_fraction": val_fraction,
        "episodes": episodes,
        "subtask_key": subtask_key,
        "on_bad_sample": on_bad_sample,
    }
    check_range("max_chunks", max_chunks, 1)
    check_range("scale", scale, 0, above=True)
    check_range("coverage", coverage, 0, 1, above=True)
    check_range("max_rmse", max_rmse, 0)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, and the tokenizer needs a folder")
    if is_tokenizer(out) and not overwrite:
        raise ValueError(f"out: {out} holds a tokenizer: name another folder, or replace it with --overwrite")
    check_writable(out, "--out")
    paths = [dataset] if isinstance(dataset, str) else dataset
    sources = sources_of(paths, {name: value for name, value in options.items() if value is not None})
    horizon, vocab_size = chunk_and_vocabulary(paths, horizon, vocab_size)
    datasets = read_datasets(sources, horizon, max_chunks)
    fast = FastTokenizer.fit(
        [chunks["train"].actions for chunks in datasets.values()],
        vocab_size,
        scale,
        coverage,
        merge,
        console.is_terminal,
    )
    held_out = {name: chunks["val" if len(chunks["val"].actions) else "train"] for name, chunks in datasets.items()}
    results = [measure(fast, name, chunks) for name, chunks in held_out.items()]
    console.print(quality_table(results))
    mend = "fit on more episodes" if coverage == 1 else "raise --coverage"
    for result in results:
        if result.coverage < 1:
            console.print(
                f"{result.dataset}: a share of {1 - result.coverage:.2g} of its coefficients is beyond the range that"
                f" the tokenizer was fitted on, and is moved to its edge: {mend} if that is too many",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    report = {"horizon": horizon, "scale": scale, "datasets": [asdict(result) for result in results]}
    problem = None if max_rmse is None else too_coarse(results, max_rmse, scale)
    told = out if problem is None else out / REFUSED  # what is in `out` may be of the tokenizer that stays there
    told.mkdir(parents=True, exist_ok=True)
    write_json(told / "report.json", report)
    draw(fast, held_out, results, told / "reconstruction.png")
    if problem is not None:
        raise ValueError(f"{problem} (see {told / 'reconstruction.png'})")
    shutil.rmtree(out / REFUSED, ignore_errors=True)
    fast.save(out)
    console.print(f"{fast.bpe.get_vocab_size()} tokens. Written to {out}", soft_wrap=True, highlight=False)


def chunk_and_vocabulary(paths: Sequence[str], horizon: int | None, vocab_size: int | None) -> tuple[int, int]:
    """Both as given, else as the model of a run's YAML has them, else π0.5's, which is said."""
    found = [
        read_configuration([path], {"model.config": ModelConfig})["model.config"] for path in filter(is_yaml, paths)
    ]
    models = [model for model in found if model is not None]
    sizes = {model.horizon for model in models}
    if horizon is None and len(sizes) > 1:
        raise ValueError(f"{', '.join(paths)}: their models have the horizons {sorted(sizes)}: say which as `horizon`")
    if horizon is None:
        horizon = sizes.pop() if sizes else ModelConfig.horizon
        console.print(f"chunks of {horizon} actions, {'the horizon of the model' if models else 'as π0.5 has them'}")
    if vocab_size is None:
        vocab_size = min((model.fast_vocab_size for model in models), default=ModelConfig.fast_vocab_size)
    check_range("horizon", horizon, 1)
    check_range("vocab_size", vocab_size, 1)
    return horizon, vocab_size


def read_datasets(
    sources: Mapping[str, LeRobotConfig], horizon: int, max_chunks: int
) -> dict[str, dict[Split, Chunks]]:
    """Chunks of every dataset by its name, several read at a time."""
    with ThreadPoolExecutor() as pool:  # most of it is in libraries that let go of the interpreter
        read = partial(read_chunks, horizon=horizon, max_chunks=max_chunks)
        robots = [_robot_of(name, sources) for name in sources]
        chunks = pool.map(read, sources.values(), robots)
        each = track(chunks, "reading", len(sources), console=console, transient=True)
        return dict(zip(sources, each, strict=True))


def sources_of(paths: Sequence[str], options: Mapping[str, Any]) -> dict[str, LeRobotConfig]:
    """What to read, by name: datasets with the options that were given, or a YAML file's sources with their own.

    ValueError where there are none, and for options beside a YAML, which they would contradict.
    """
    found: dict[str, LeRobotConfig] = {}
    for path in paths:
        if not is_yaml(path):
            found[path] = _of_actions(LeRobotConfig(path, **options))
            continue
        if options:
            raise ValueError(
                f"{path} says itself how its sources are read: leave out {', '.join(options)}, or set them there, under"
                " data.sources"
            )
        sources = read_configuration([path], {"data.sources": dict[str, SourceConfig]})["data.sources"] or {}
        for name, config in sources.items():
            if isinstance(config, LeRobotConfig) and config.action_keys:
                # with its cameras and states, as frames that lack one are not trained on
                config = replace(config, image_cache=False)
                if found.setdefault(name, config) != config:
                    raise ValueError(f"{path}: data.sources.{name} is read otherwise in another file: rename one")
    if not found:
        raise ValueError(f"{', '.join(paths)}: no LeRobotConfig with actions under data.sources")
    return found


def _robot_of(name: str, sources: Mapping[str, LeRobotConfig]) -> LeRobotConfig | None:
    """The source whose statistics this one shares; None where they are its own. ValueError where there is none."""
    other = sources[name].same_robot_as
    if other is not None and (other not in sources or sources[other].same_robot_as is not None):
        raise ValueError(f"data.sources.{name}: same_robot_as {other!r} names no source with actions of its own")
    return sources[other] if other is not None else None


def _of_actions(config: LeRobotConfig) -> LeRobotConfig:
    """The same without what chunks do not need: images, instructions, and a state that nothing is relative to."""
    return replace(config, cameras={}, task="any", state_keys=config.state_keys if config.relative_dims else [])


def too_coarse(results: Sequence[Quality], max_rmse: float, scale: float) -> str | None:
    """What to say where a dimension's error is above max_rmse, with what to do."""
    worst = max(results, key=lambda result: max(result.rmse))
    error = max(worst.rmse)
    if error <= max_rmse:
        return None
    return (
        f"the largest reconstruction error is {error:.4f} ({worst.dataset}, dim {worst.rmse.index(error)}), above"
        f" max_rmse {max_rmse:g}: raise scale, which is {scale:g}, or fit on more episodes where coverage is below"
        " 100 %. No tokenizer was written"
    )


def quality_table(results: Sequence[Quality]) -> Table:
    title = "FAST on held-out episodes; where there are none, on training episodes"
    headings = ("chunks", "values", "tokens", "p99", "shorter", "RMSE", "worst dim", "coverage")
    figures = [Column(heading, justify="right") for heading in headings]
    table = table_of(title, [Column("dataset", overflow="fold"), *figures])
    for result in results:
        rmse = np.array(result.rmse)
        table.add_row(
            escape(result.dataset),
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


def draw(fast: FastTokenizer, chunks: Mapping[str, Chunks], results: Sequence[Quality], path: Path) -> None:
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
